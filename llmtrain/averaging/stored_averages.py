"""Averages made of averages that a run stored: any span from two running means, any EMA from two.

Why: a mean over *every* step, or an EMA of a length nobody thought of before the run, cannot be made
from snapshots; but it is a sum of a few online averages that were kept beside them.

    plan = dense_plan(series, start=2000, to=3000)
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llmtrain.averaging.coefficients import span
from llmtrain.averaging.power_ema import WIDEST, gamma_of, reconstruct
from llmtrain.averaging.spec import AverageSpec
from llmtrain.checkpoints.checkpoint import PROVENANCE_FILE, Checkpoint
from llmtrain.checkpoints.open import open_checkpoint, with_residual
from llmtrain.checkpoints.series import Input, Series, recorded_hashes
from llmtrain.checkpoints.windows import describe_steps
from llmtrain.errors import UserError
from llmtrain.storage.json_files import read_json
from llmtrain.storage.run_folder import step_folders

RUNNING_MEAN = "running-mean"
POWER_EMA = "power-ema"


def dense_plan(series: Series, start: int | None, to: int | None) -> AverageSpec:
    """The mean of the weights after every step in (start, to], from two stored running means.

    See `coefficients.span`. From the step at which the running mean began, one is enough.

    Raises:
        UserError: a step is missing, or no running mean was stored there.
    """
    if start is None or to is None or start >= to:
        raise UserError(
            "--method dense needs --from A and --to B, A before B", hint="--from 2000 --to 3000"
        )
    stored = _stored(series.averages / RUNNING_MEAN, RUNNING_MEAN)
    began = min((int(about["start"]) for _, about in stored.values()), default=0)
    absent = [step for step in (start, to) if step not in stored and not (step == start == began)]
    if absent or not stored:
        raise UserError(
            f"{series.name} has no running mean at {describe_steps(absent)}; it has {describe_steps(list(stored))}",
            hint="{kind: running-mean} under averages in the config stores one with each snapshot"
            if not stored
            else f"--from {began} or one of those steps",
        )
    updates = [int(stored[step][1]["updates"]) if step in stored else 0 for step in (start, to)]
    if updates[0] >= updates[1]:
        raise UserError(
            f"the running means at {start:,} and {to:,} have {updates[0]:,} and {updates[1]:,} updates",
            hint="nothing lies between them: choose a longer span",
        )
    inputs, weights = [_input(to, stored[to][0])], [1.0]
    if updates[0] > 0:
        inputs.insert(0, _input(start, stored[start][0]))
        weights = span(*updates)
    options = {
        "from": start,
        "to": to,
        "updates": updates[1] - updates[0],
        "every": stored[to][1].get("every"),
    }
    return AverageSpec(
        "dense",
        f"dense-{start}-{to}",
        tuple(inputs),
        tuple(weights),
        series.averages,
        options,
        audited=False,
    )


def power_ema_plans(series: Series, sigma_rel: float | None, at: int | str) -> list[AverageSpec]:
    """The power-function EMA of width `sigma_rel` at a step, from stored ones up to that step.

    See `power_ema.reconstruct`.

    Raises:
        UserError: no width, none stored, or none at that step.
    """
    if sigma_rel is None or not 0.0 < sigma_rel <= WIDEST:
        raise UserError(
            f"--method posthoc-ema needs --sigma-rel between 0 and {WIDEST:.4f}, the width as a share of training",
            hint="such as --sigma-rel 0.1",
        )
    stored = [
        (step, path, about)
        for folder in sorted(series.averages.glob(f"{POWER_EMA}-*"))
        for step, (path, about) in _stored(folder, POWER_EMA).items()
    ]
    steps = sorted({step for step, _, _ in stored})
    ends = (
        steps
        if at == "all"
        else steps[-1:]
        if at == "last"
        else [step for step in steps if step == at]
    )
    if not ends:
        raise UserError(
            f"{series.name} has no power-function EMA at step {at}; it has them at {describe_steps(steps)}"
            if steps
            else f"{series.name} has stored no power-function EMA",
            hint="{kind: power-ema} under averages in the config stores them with each snapshot",
        )
    gamma = gamma_of(sigma_rel)
    plans = []
    for end in ends:
        used = sorted(
            (item for item in stored if item[0] <= end), key=lambda item: (item[0], str(item[1]))
        )
        times = [
            (float(step - int(about["start"])), float(about["gamma"])) for step, _, about in used
        ]
        weights, error = reconstruct(times, max(time for time, _ in times), gamma)
        inputs = tuple(_input(step, path) for step, path, _ in used)
        options = {"sigma_rel": sigma_rel, "gamma": gamma, "profile_error": error}
        label = f"posthoc-ema-{sigma_rel:g}"
        plans.append(
            AverageSpec(
                "posthoc-ema",
                label,
                inputs,
                tuple(weights),
                series.averages,
                options,
                audited=False,
            )
        )
    return plans


def _stored(folder: Path, method: str) -> dict[int, tuple[Path, dict[str, Any]]]:
    """Folders of one online average by step, with what their provenance says."""
    found = {}
    for step, path in step_folders(folder).items():
        about = read_json(path / PROVENANCE_FILE)
        if about.get("method") == method:
            _require_numbers(path, about, ("start", "gamma" if method == POWER_EMA else "updates"))
            found[step] = (path, about)
    return found


def _require_numbers(folder: Path, about: dict[str, Any], keys: Sequence[str]) -> None:
    """Raise a UserError unless the provenance of a stored average holds what its weights follow from."""
    for key in keys:
        if type(about.get(key)) not in (int, float) or not 0 <= about[key] < 2**63:
            raise UserError(
                f"{folder / PROVENANCE_FILE}: {key} is {about.get(key)!r:.40}, no number that a run writes",
                hint="the file is damaged: restore it, or delete the folder",
            )


def _input(step: int, folder: Path) -> Input:
    def opened() -> Checkpoint:
        return with_residual(open_checkpoint(folder, step=step))

    return Input(step, str(folder), opened, partial(recorded_hashes, folder))
