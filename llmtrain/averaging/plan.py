"""From the words of the command line to the averages that are to be made.

Why: which windows, which weights, which name and which folder are decided here, before anything is
read; every wrong combination is answered with the right one.

    plans = lawa_plans(series, run, every=1000, window=5, at="last", disjoint=False, label=None, out=None)
"""

import re
from pathlib import Path

from llmtrain.averaging.average import Plan
from llmtrain.averaging.coefficients import uniform
from llmtrain.averaging.series import Series
from llmtrain.averaging.windows import describe_spacings, describe_steps, possible_spacings
from llmtrain.errors import UserError
from llmtrain.files import RunFolder, step_name

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def lawa_plans(
    series: Series,
    run: RunFolder,
    *,
    every: int | None,
    window: int,
    at: str,
    disjoint: bool,
    label: str | None,
    out: Path | None,
) -> list[Plan]:
    """Uniform windows of a run (`coefficients.uniform`).

    Raises:
        UserError: no such window, or an impossible `at`, `label` or `every`.
    """
    if every is None:
        spacings = possible_spacings(series.steps, window)
        raise UserError(
            f"--every is required; {series.name} has checkpoints at {describe_steps(series.steps)}",
            hint=f"--every {describe_spacings(spacings)} gives a window of {window}"
            if spacings
            else "--window 1 or a longer run",
        )
    if at not in ("last", "all") and not at.isdecimal():
        raise UserError(f"--at {at!r} is not last, all or a step", hint="--at last")
    label = label or f"lawa-{window}x{every}"
    if not _LABEL.fullmatch(label):
        raise UserError(f"--label {label!r} is no name of a folder", hint="letters, digits, - _ .")
    windows = series.windows(
        every=every, size=window, at=at if at in ("last", "all") else int(at), disjoint=disjoint
    )
    weights = uniform(window)
    options = {"every": every, "window": window}

    def target(step: int) -> Path:
        if out is None:
            return run.average(label, step)
        return out / step_name(step) if at == "all" else out

    return [Plan("lawa", label, steps, weights, target(steps[-1]), options) for steps in windows]
