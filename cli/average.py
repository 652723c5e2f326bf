"""The `llmtrain average` command."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.models import OptionInfo

from llmtrain.averaging.coefficients import Shape
from llmtrain.averaging.request import (
    CHECKS,
    METHODS,
    AverageRequest,
    Integers,
    MergeOptions,
    parse_checks,
    parse_decay,
)
from llmtrain.errors import UserError

from .common import help_of, local_folder, warn

Dtype = Literal["float64", "float32", "float16", "bfloat16"]

_METHOD, _OUTPUT, _INPUTS, _SEARCH = "Methods", "Output", "Inputs", "Search"
_HIDDEN = typer.Option(hidden=True)
"""A renamed option."""


def _option(help: str, panel: str | None = None, *names: str, **more: Any) -> OptionInfo:
    option: OptionInfo = typer.Option(
        *names, help=help, rich_help_panel=panel, show_default=False, **more
    )
    return option


def _field(name: str, panel: str | None = None, *names: str, **more: Any) -> OptionInfo:
    return _option(help_of(AverageRequest, name), panel, *names, **more)


_METHOD_HELP = " ".join(f"{name}: {each.help}." for name, each in METHODS.items())
_CHECKS_HELP = "Changes to the checks of the inputs, separated by commas. " + " ".join(
    f"{name}: {text}." for name, (_, _, text) in CHECKS.items()
)
_REVISION_HELP = "Names of revisions: {N} is the step, * matches anything.  [default: step{N}]"
_SWEEP_HELP = (
    'Evaluate every combination without writing it: "window=3,5,10 every=200,400" (also method, '
    "decay, half-life, shape, from, blend, sigma-rel). Compares at several steps; --at selects "
    "all snapshots, the last window, or one step."
)


def average(
    source: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a run, folder of checkpoints, or OWNER/NAME on the hub. "
            "Default: the newest run under runs/.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[int | None, _field("every", min=1)] = None,
    window: Annotated[int | None, _field("window", min=1)] = None,
    at: Annotated[str | None, _field("at")] = None,
    disjoint: Annotated[bool, _field("disjoint", None, "--disjoint")] = False,
    method: Annotated[
        str,
        typer.Option(help=_METHOD_HELP, metavar="METHOD", rich_help_panel=_METHOD),
    ] = "lawa",
    start: Annotated[int | None, _field("start", _METHOD, "--from", min=1)] = None,
    decay: Annotated[str | None, _field("decay", _METHOD)] = None,
    shape: Annotated[Shape | None, _field("shape", _METHOD)] = None,
    sigma_rel: Annotated[float | None, _field("sigma_rel", _METHOD)] = None,
    weights: Annotated[Path | None, _field("weights", _METHOD)] = None,
    blend: Annotated[float | None, _field("blend", _METHOD)] = None,
    show_weights: Annotated[
        bool, _option("Print the weights and stop.", _METHOD, "--show-weights")
    ] = False,
    out: Annotated[Path | None, _field("out", _OUTPUT, callback=local_folder)] = None,
    dtype: Annotated[Dtype | None, _option(help_of(MergeOptions, "dtype"), _OUTPUT)] = None,
    as_json: Annotated[bool, _option("Print the result as JSON.", _OUTPUT, "--json")] = False,
    checks: Annotated[str, _option(_CHECKS_HELP, _INPUTS)] = "",
    revision_pattern: Annotated[str | None, _option(_REVISION_HELP, _INPUTS)] = None,
    discard_inputs: Annotated[
        bool, _option(help_of(MergeOptions, "discard_inputs"), _INPUTS, "--discard-inputs")
    ] = False,
    sweep: Annotated[str | None, _option(_SWEEP_HELP, _SEARCH)] = None,
    write_best: Annotated[
        bool, _option("Write the best average of the sweep.", _SEARCH, "--write-best")
    ] = False,
    to: Annotated[str | None, _HIDDEN] = None,
    half_life: Annotated[str | None, _HIDDEN] = None,
    label: Annotated[str | None, _HIDDEN] = None,
    integers: Annotated[Integers | None, _HIDDEN] = None,
    verify: Annotated[bool, _HIDDEN] = True,
    strict: Annotated[bool, _HIDDEN] = False,
    allow_duplicates: Annotated[bool, _HIDDEN] = False,
    allow_known_bad: Annotated[bool, _HIDDEN] = False,
) -> None:
    """Average checkpoints of one run (LAWA: the mean of the last --window, --every steps apart).

    Training is unaffected. Windows are complete and exclude checkpoints from warm-up.
    """
    renamed = {
        "--to": (to, "--at"),
        "--half-life": (half_life, "--decay half-life=STEPS"),
        "--label": (label, "--out RUN/averages/LABEL/step-STEP"),
        "--integers": (integers, "--checks allow-integers"),
        "--no-verify": (not verify, "--checks no-verify"),
        "--strict": (strict, "--checks strict"),
        "--allow-duplicates": (allow_duplicates, "--checks allow-duplicates"),
        "--allow-known-bad": (allow_known_bad, "--checks allow-known-bad"),
    }
    for old, (given, new) in renamed.items():
        if given not in (None, False, "equal"):
            warn(f"{old} was renamed: use {new}")
            if new.startswith("--checks"):
                checks += f",{new.split()[1]}"
    for name, earlier, value in (("--decay", half_life, decay), ("--at", to, at)):
        if earlier is not None and value is not None:
            raise UserError(f"{name} is given twice, once by its earlier name", hint="keep one")
    if half_life is not None:
        decay = f"half-life={half_life}"
    request = AverageRequest(
        method=method,
        every=every,
        window=window,
        at=at if to is None else to,
        disjoint=disjoint or None,
        start=start,
        shape=shape,
        sigma_rel=sigma_rel,
        weights=weights,
        blend=blend,
        label=label,
        out=out,
        **({} if decay is None else parse_decay(decay)),
    )
    changed_checks = parse_checks(checks)
    if write_best and sweep is None:
        raise UserError("--write-best needs --sweep", hint='add --sweep "window=3,5 every=200,400"')

    # numpy starts BLAS threads that would spin on the cores that the merge needs.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    from llmtrain.checkpoints.writer import DTYPES

    from .average_output import average_series, evaluate_sweep

    options = MergeOptions(
        dtype=DTYPES[dtype] if dtype else None, discard_inputs=discard_inputs, **changed_checks
    )
    if sweep is None:
        average_series(source, revision_pattern, request, options, show_weights, as_json)
        return
    if options != MergeOptions() or show_weights or revision_pattern is not None:
        raise UserError(
            "--sweep evaluates in memory and takes no options for output, checks or the hub",
            hint="sweep first, then make the best average with these options",
        )
    evaluate_sweep(source, sweep, request, write_best=write_best, as_json=as_json)
