"""Averages of a series, from the plan to the committed folders.

Why: one place decides what is read, what is kept because it exists already, and what a folder says
about its inputs; the numbers are `coefficients.py`, the bytes `merge.py`.

    average(series, [Plan("lawa", "lawa-5x1000", window, uniform(5), target, {"every": 1000})])
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain import __version__
from llmtrain.averaging.merge import Mixture, merge
from llmtrain.averaging.output import WeightsWriter, carry_over
from llmtrain.averaging.series import Checkpoint, Series, check_alike
from llmtrain.averaging.windows import Window
from llmtrain.errors import UserError
from llmtrain.files import sha256_of, staged_folder
from llmtrain.weights_folder import PROVENANCE_FILE, WEIGHTS_FILE, read_json, write_json

AT_A_TIME = 64
"""Averages computed in one pass: a kill loses at most these, and two passes share k - 1 inputs."""


@dataclass(frozen=True)
class Plan:
    """One average to be made."""

    method: str
    label: str
    window: Window
    weights: Sequence[float]
    """One for each step of the window."""
    target: Path
    """The folder to be written; its name says which step it stands for."""
    options: dict[str, Any] = field(default_factory=dict)
    """The method's parameters, for the provenance."""

    @property
    def step(self) -> int:
        """The step the average stands for: its newest input's."""
        return self.window[-1]


@dataclass(frozen=True)
class Average:
    """One average that lies on disk."""

    plan: Plan
    kept: bool
    """It was there already, of the same inputs and weights."""

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {
            "label": self.plan.label,
            "step": self.plan.step,
            "path": str(self.plan.target),
            "inputs": list(self.plan.window),
            "weights": list(self.plan.weights),
        }


def average(
    series: Series,
    plans: Sequence[Plan],
    *,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Average]:
    """Make every planned average, reading each checkpoint once for up to `AT_A_TIME` of them.

    Args:
        series: where the checkpoints are.
        plans: ascending by step.
        verify: hash files whose SHA-256 was recorded when they were committed as well.
        progress: called with pieces done and in all, anew for each pass.

    Raises:
        UserError: an input is missing, damaged or unlike the others, or a target holds something else.
        RunFailed: the disk is full.
    """
    steps = sorted({step for plan in plans for step in plan.window})
    checkpoints = {step: series.load(step) for step in steps}
    check_alike(list(checkpoints.values()))
    hashes = dict(zip(steps, _hashes(list(checkpoints.values()), verify), strict=True))
    results: dict[Path, Average] = {}
    missing = []
    for plan in plans:
        document = _provenance(plan, checkpoints, hashes)
        if plan.target.exists():
            _require_same(plan, document)
            results[plan.target] = Average(plan, kept=True)
        else:
            missing.append((plan, document))
    for start in range(0, len(missing), AT_A_TIME):
        group = missing[start : start + AT_A_TIME]
        _make(group, checkpoints, progress)
        results |= {plan.target: Average(plan, kept=False) for plan, _ in group}
    return [results[plan.target] for plan in plans]


def _make(
    group: Sequence[tuple[Plan, dict[str, Any]]],
    checkpoints: dict[int, Checkpoint],
    progress: Callable[[int, int], None] | None,
) -> None:
    """One pass: all averages of the group are committed at its end, or none is."""
    steps = sorted({step for plan, _ in group for step in plan.window})
    index = {step: i for i, step in enumerate(steps)}
    with ExitStack() as commits, ExitStack() as files:
        writers = []
        for plan, document in group:
            folder = commits.enter_context(staged_folder(plan.target))
            newest = checkpoints[plan.step]
            carry_over(newest.path, folder)
            write_json(folder / PROVENANCE_FILE, document)
            writers.append(files.enter_context(WeightsWriter(folder, {WEIGHTS_FILE: newest.tensors})))
        mixtures = [
            Mixture(tuple(index[step] for step in plan.window), tuple(plan.weights)) for plan, _ in group
        ]
        inputs = [checkpoints[step] for step in steps]
        merge(inputs, mixtures, [writer.write for writer in writers], progress=progress)


def _hashes(checkpoints: Sequence[Checkpoint], verify: bool) -> list[tuple[dict[str, str], str]]:
    """SHA-256 of each weights file of each checkpoint, and whether it was `recorded` or `computed`.

    Raises:
        UserError: a file is not what was recorded.
    """
    recorded = [checkpoint.recorded_hashes() for checkpoint in checkpoints]

    def of(checkpoint: Checkpoint, record: dict[str, str] | None) -> tuple[dict[str, str], str]:
        if record is not None and not verify:
            return record, "recorded"
        computed = {path.name: sha256_of(path) for path in checkpoint.shards}
        for path in checkpoint.shards:
            if record is not None and record[path.name] != computed[path.name]:
                raise UserError(
                    f"{path} has another SHA-256 than when it was written",
                    hint="the file is damaged: restore it, or average a window without this step",
                )
        return computed, "computed"

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(of, checkpoints, recorded))


def _provenance(
    plan: Plan, checkpoints: dict[int, Checkpoint], hashes: dict[int, tuple[dict[str, str], str]]
) -> dict[str, Any]:
    """What `provenance.json` says: method, weights, and for each input what it was."""
    inputs = []
    for step, weight in zip(plan.window, plan.weights, strict=True):
        origin = checkpoints[step].origin
        files, source = hashes[step]
        inputs.append(
            {
                "path": str(checkpoints[step].path),
                "step": step,
                "weight": weight,
                "lr": origin.lr if origin else None,
                "tokens": origin.tokens if origin else None,
                "sha256": next(iter(files.values())),
                "sha256_source": source,
            }
        )
    return {
        "llmtrain": __version__,
        "method": plan.method,
        "label": plan.label,
        "step": plan.step,
        "options": plan.options,
        "arithmetic": "float64 sums, rounded once",
        "inputs": inputs,
    }


def _require_same(plan: Plan, wanted: dict[str, Any]) -> None:
    """Raise a UserError unless the folder that exists is the average that is wanted."""
    path = plan.target / PROVENANCE_FILE
    there = read_json(path) if path.exists() else {}

    def essence(document: dict[str, Any]) -> list[tuple[object, object]]:
        return [(i.get("step"), i.get("sha256")) for i in document.get("inputs", [])]

    same = essence(there) == essence(wanted) and all(
        math.isclose(a["weight"], b["weight"], rel_tol=1e-12)
        for a, b in zip(there["inputs"], wanted["inputs"], strict=True)
    )
    if not same:
        raise UserError(
            f"{plan.target} exists and is not the average of these checkpoints with these weights",
            hint="--label NAME or --out DIR writes beside it; or delete it",
        )
