"""`llmtrain average`: turn checkpoints of one run, or of a public series, into a better model.

llmtrain average --every 1000
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Method(StrEnum):
    """What is averaged; each is explained, with its source, in llmtrain/averaging/coefficients.py."""

    lawa = "lawa"
    swa = "swa"
    ema = "ema"
    linear = "linear"
    decay = "decay"
    custom = "custom"
    posthoc = "posthoc-ema"
    dense = "dense"


class DecayShape(StrEnum):
    """Shape of the learning-rate decay that a merge stands for."""

    linear = "linear"
    cosine = "cosine"
    one_minus_sqrt = "1-sqrt"
    inverse_sqrt = "inverse-sqrt"


class Integers(StrEnum):
    """What is done with tensors that have no mean."""

    equal = "equal"
    last = "last"


class Dtype(StrEnum):
    """Dtype of the written weights."""

    float64 = "float64"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


_METHODS = "Methods"
_OUTPUT = "Output"
_HUB = "Series on the hub"
_PROOF = "Checks of the inputs"
_SEARCH = "Search"


def average(
    source: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a run, folder of checkpoints, or OWNER/NAME on the hub. "
            "Default: the newest run under runs/.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(help="Training steps between two checkpoints.", min=1, show_default=False),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Checkpoints in a window.  [default: 5; ema: all]", min=1, show_default=False
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            help="Step the average stands for: last (the newest possible), all, or a step.  [default: last]",
            show_default=False,
        ),
    ] = None,
    disjoint: Annotated[
        bool,
        typer.Option(
            "--disjoint", help="Windows that share no checkpoint, as in the paper's script."
        ),
    ] = False,
    method: Annotated[
        Method,
        typer.Option(
            help="lawa: mean of a window. swa: mean of all --from a step on. ema: exponential. "
            "linear: weights 1…k. decay: equals a learning-rate decay over the window. custom: --weights. "
            "posthoc-ema: any power-function EMA, from two that the run stored. "
            "dense: mean over every step between --from and --to, from two running means that the run stored.",
            rich_help_panel=_METHODS,
        ),
    ] = Method.lawa,
    start: Annotated[
        int | None,
        typer.Option(
            "--from",
            help="First step that may be used (swa, ema); dense: after it.",
            min=1,
            rich_help_panel=_METHODS,
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        int | None,
        typer.Option(
            help="Last step (dense).", min=1, rich_help_panel=_METHODS, show_default=False
        ),
    ] = None,
    decay: Annotated[
        float | None,
        typer.Option(
            help="Per checkpoint, in [0, 1) (ema).", rich_help_panel=_METHODS, show_default=False
        ),
    ] = None,
    half_life: Annotated[
        float | None,
        typer.Option(
            help="In training steps, instead of --decay (ema).",
            rich_help_panel=_METHODS,
            show_default=False,
        ),
    ] = None,
    like_online: Annotated[
        bool,
        typer.Option(
            "--like-online",
            help="The trainer's arithmetic and warm-up, to the bit (ema).",
            rich_help_panel=_METHODS,
        ),
    ] = False,
    shape: Annotated[
        DecayShape | None,
        typer.Option(
            help="Of the decay (decay).  [default: 1-sqrt]",
            rich_help_panel=_METHODS,
            show_default=False,
        ),
    ] = None,
    sigma_rel: Annotated[
        float | None,
        typer.Option(
            help="Width as a share of training, up to 0.2886 (posthoc-ema).",
            rich_help_panel=_METHODS,
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help='JSON: {"1000": 0.25, "2000": 0.75}, or a list for a window (custom).',
            rich_help_panel=_METHODS,
            show_default=False,
        ),
    ] = None,
    blend: Annotated[
        float | None,
        typer.Option(
            help="Share of the newest checkpoint mixed into the average, 0 to 1.",
            rich_help_panel=_METHODS,
            show_default=False,
        ),
    ] = None,
    show_weights: Annotated[
        bool,
        typer.Option(
            "--show-weights",
            help="Print the weights and average nothing.",
            rich_help_panel=_METHODS,
        ),
    ] = False,
    label: Annotated[
        str | None,
        typer.Option(
            help="Name of the average.  [default: such as lawa-5x1000]",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write.  [default: averages/LABEL/step-STEP in the run, or here]",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Of the written weights.  [default: the inputs']",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            help="Such as 5GB.  [default: sharded as the newest input]",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    integers: Annotated[
        Integers,
        typer.Option(
            help="Tensors of integers must be equal in all inputs, or are the last's.",
            rich_help_panel=_OUTPUT,
        ),
    ] = Integers.equal,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=_OUTPUT)
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Hash a run's own snapshots and compare with the record; else compare only their sizes.",
            rich_help_panel=_PROOF,
        ),
    ] = True,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="A checkpoint off the trajectory is an error.", rich_help_panel=_PROOF
        ),
    ] = False,
    allow_duplicates: Annotated[
        bool,
        typer.Option(
            "--allow-duplicates",
            help="Accept the same content at two steps.",
            rich_help_panel=_PROOF,
        ),
    ] = False,
    allow_known_bad: Annotated[
        bool,
        typer.Option(
            "--allow-known-bad",
            help="Accept public revisions known to be wrong.",
            rich_help_panel=_PROOF,
        ),
    ] = False,
    revision_pattern: Annotated[
        str | None,
        typer.Option(
            help="Name of a revision, {N} for the step, * for anything.  [default: step{N}]",
            rich_help_panel=_HUB,
            show_default=False,
        ),
    ] = None,
    discard_inputs: Annotated[
        bool,
        typer.Option(
            "--discard-inputs",
            help="Delete each download once it is summed: the disk holds one.",
            rich_help_panel=_HUB,
        ),
    ] = False,
    sweep: Annotated[
        str | None,
        typer.Option(
            help='Evaluate every combination without writing it: "window=3,5,10 every=200,400" '
            "(also method, decay, half-life, shape, from, blend, sigma-rel). --at all: at every snapshot; "
            "--at STEP or last: there alone.",
            rich_help_panel=_SEARCH,
            show_default=False,
        ),
    ] = None,
    write_best: Annotated[
        bool,
        typer.Option(
            "--write-best", help="Write the best one of the sweep.", rich_help_panel=_SEARCH
        ),
    ] = False,
) -> None:
    """Average checkpoints of one run (LAWA: the mean of the last --window, --every steps apart).

    Training is never touched. Checkpoints from warm-up are never used, windows are always complete.
    """
    from llmtrain.averaging.request import AverageRequest, make_specs
    from llmtrain.averaging.spec import MergeOptions
    from llmtrain.checkpoints.resolve import find_series
    from llmtrain.checkpoints.writer import DTYPES, parse_size
    from llmtrain.errors import UserError

    from .average_output import evaluate_sweep, print_averages, print_weights, run_plans
    from .common import print_json, warn

    request = AverageRequest(
        method=method.value,
        every=every,
        window=window,
        at=at,
        disjoint=disjoint or None,
        start=start,
        to=to,
        shape=shape.value if shape else None,
        decay=decay,
        half_life=half_life,
        like_online=like_online or None,
        sigma_rel=sigma_rel,
        weights=weights,
        blend=blend,
        label=label,
        out=out,
    )
    settings = MergeOptions(
        dtype=DTYPES[dtype.value] if dtype else None,
        max_shard=parse_size(max_shard_size) if max_shard_size else None,
        integers=integers.value,
        verify=verify,
        strict=strict,
        allow_duplicates=allow_duplicates,
        allow_known_bad=allow_known_bad,
        discard_inputs=discard_inputs,
    )
    if write_best and sweep is None:
        raise UserError(
            "--write-best goes with --sweep", hint='--sweep "window=3,5,10 every=200,400"'
        )
    if sweep is not None:
        if settings != MergeOptions() or show_weights or revision_pattern is not None:
            raise UserError(
                "--sweep evaluates in memory and takes none of the options for output, checks and the hub",
                hint="sweep first, then make the best one with the options you want",
            )
        evaluate_sweep(source, sweep, request, write_best=write_best, as_json=as_json)
        return
    series = find_series(source, revision_pattern=revision_pattern, discard=discard_inputs)
    plans = make_specs(series, request)
    if show_weights:
        print_weights(plans, as_json)
        return
    if (
        method not in (Method.custom, Method.dense)
        and (request.at or "last") == "last"
        and plans[-1].step < series.steps[-1]
    ):
        warn(
            f"the newest checkpoint, step {series.steps[-1]:,}, ends no such window; "
            f"the average is that of step {plans[-1].step:,}"
        )
    for plan in plans:
        if plan.options.get("profile_error", 0.0) > 0.1:
            warn(
                f"{plan.label} at step {plan.step:,} is {plan.options['profile_error']:.0%} off the profile asked for: "
                "the stored averages are too few, or too unlike that width"
            )
    results = run_plans(series, plans, settings)
    if as_json:
        print_json([result.as_json() for result in results])
    else:
        print_averages(results)
