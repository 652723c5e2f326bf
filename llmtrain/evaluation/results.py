"""Result types for losses and tasks, the cached losses of a run, the choice of its best weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from pydantic import FiniteFloat

from llmtrain.checkpoints.resolve import Target, find_targets
from llmtrain.evaluation.cache import read_result, weights_sha256
from llmtrain.storage.run_folder import RAW, RunFolder

Progress = Callable[[Target, str, int, int], None]
"""Called with the target, the split, file or task, units done and total; may raise to stop."""


@dataclass(frozen=True)
class EvalResult:
    """The loss of one set of weights on a split."""

    label: str
    step: int | None
    path: str
    run: str | None
    """Name of the run folder."""
    loss: FiniteFloat
    """Nats per token."""
    perplexity: float | None
    """exp(loss); None if it overflows."""
    bits_per_byte: float | None
    tokens: int
    bytes: int
    seconds: float
    delta: float | None
    """Loss minus the raw loss of the same step and run, if that was measured."""
    split: str
    block_size: int
    precision: str
    data: str
    """SHA-256 of the data's manifest."""
    weights: str
    """SHA-256 of the weights."""


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    stderr: float | None
    """Standard error, if lm-eval computes one."""
    higher_is_better: bool | None
    documents: int | None


@dataclass(frozen=True)
class TaskResult:
    """Scores of one set of weights in a task, or in each task of a group."""

    task: str
    """Name of the task or group, as requested."""
    source: str
    """Location of the documents: `hub`, a local file, or a folder of task files."""
    limit: int | None
    lm_eval: str
    """Version of lm-eval."""
    context: int
    """Context length in tokens."""
    truncated: float
    """Share of requests longer than the context, whose start was cut off."""
    seconds: float
    scores: list[Score]


def stored_results(run: RunFolder) -> list[EvalResult]:
    """Return the cached losses of a run, raw first, then by label and step.

    Results of weights that have been replaced since are left out.

    Raises:
        UserError: a file is damaged.
    """
    paths = sorted(run.evals.glob("[!.]*.json"))
    read = [found for path in paths if (found := read_result(path, EvalResult)) is not None]
    results = [result for result in read if _is_current(run, result)]
    raw = {_comparable_key(result): result.loss for result in results if result.label == RAW}
    return sorted(
        (_with_delta(result, raw.get(_comparable_key(result))) for result in results),
        key=lambda result: (result.label != RAW, result.label, result.step or 0),
    )


def choose_weights(name: str | None) -> tuple[Target, Target | None]:
    """Return one set of weights and, if it is an average, the raw weights of its step.

    A run stands for its newest average or, without averages, its newest snapshot. Among averages of
    one step, the lowest measured loss wins, else the first name. None is the newest run.

    Raises:
        UserError: the name matches none of these.
        RunFailed: the hub cannot be reached.
    """
    targets = find_targets(name)
    last = targets[-1]
    newest = [target for target in targets if target.step == last.step]
    raw = next((target for target in newest if target.label == RAW), None)
    averages = [target for target in newest if target.label != RAW]
    if len(averages) < 2:
        return last, raw if last is not raw else None
    assert last.run is not None
    deltas = {
        result.label: result.delta
        for result in stored_results(last.run)
        if result.step == last.step and result.split == "val" and result.delta is not None
    }
    return min(averages, key=lambda each: (deltas.get(each.label, math.inf), each.label)), raw


def _with_delta(result: EvalResult, raw: float | None) -> EvalResult:
    return replace(result, delta=None if raw is None else result.loss - raw)


def _comparable_key(result: EvalResult) -> tuple[object, ...]:
    """Return what two results must share for their difference to mean something."""
    return result.step, result.data, result.split, result.tokens, result.precision


def _is_current(run: RunFolder, result: EvalResult) -> bool:
    """Return whether the measured weights are still there, or their folder is gone."""
    if result.step is None:
        return False
    raw = result.label == RAW
    folder = run.snapshot(result.step) if raw else run.average(result.label, result.step)
    return not folder.is_dir() or weights_sha256(folder) == result.weights
