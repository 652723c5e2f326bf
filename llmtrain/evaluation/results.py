"""Results of evaluation, stored as JSON under a run's `evals/`.

Why by content: a file name contains a hash of everything the result depends on, such as the
weights, the data and the precision. Retrained weights are measured again; a moved folder is not.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from llmtrain.checkpoints.resolve import Target
from llmtrain.errors import UserError, WriteFailed
from llmtrain.evaluation.weights import discarded_inputs, is_unchanged, weights_digest
from llmtrain.storage.commit import write_atomically
from llmtrain.storage.integrity import Digest
from llmtrain.storage.json_files import read_json
from llmtrain.storage.run_folder import RAW, RunFolder, step_name

Result = TypeVar("Result")
Progress = Callable[[Target, str, int, int], None]
"""Called with the target, the split, file or task, units done and total; may raise to stop."""


@dataclass(frozen=True)
class EvalResult:
    """The loss of one set of weights on a split, in nats per token."""

    label: str
    step: int | None
    path: str
    run: str | None
    loss: FiniteFloat
    perplexity: float | None
    """None if it overflows."""
    bits_per_byte: float | None
    tokens: int
    bytes: int
    seconds: float
    delta: float | None
    """Loss minus the raw loss of the same step and run, if measured."""
    split: str
    block_size: int
    precision: str
    data: str
    """SHA-256 of the manifest."""
    weights: str
    """Digest of the weights; see `Digest.parse`."""
    stderr: float | None = None
    """Standard error of `loss`; None for one window and for results of earlier versions."""
    discarded: bool = False
    """True if the average contains discarded snapshots: see `discarded_inputs`."""

    def with_delta(self, raw: float | None) -> "EvalResult":
        """Return the result with its difference from the raw loss, if they can be compared."""
        return replace(self, delta=None if raw is None or self.discarded else self.loss - raw)


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    documents: int | None


@dataclass(frozen=True)
class TaskResult:
    """Scores of one set of weights in a task, or in each task of a group."""

    task: str
    source: str
    """See `TaskDefinition`."""
    limit: int | None
    lm_eval: str
    """Version of lm-eval."""
    context: int
    truncated: float
    """Share of requests longer than the context, whose start was cut off."""
    seconds: float
    scores: list[Score]


def ignore(message: str) -> None:
    """Drop a warning."""


def cached(
    target: Target,
    kind: str,
    weights: Digest,
    identity: str,
    form: type[Result],
    measure: Callable[[], Result],
    warn: Callable[[str], None],
) -> Result:
    """Return the stored result, or measure and store it. Weights outside a run are always measured.

    `kind` is a subfolder of `evals/`, or empty. `weights` is the digest of the target, computed by
    `weights_digest`. The result depends on nothing but `weights` and `identity`.
    """
    if target.run is None:
        return measure()
    key = hashlib.sha256(f"{weights}{identity}".encode()).hexdigest()[:16]
    step = "" if target.step is None else f"-{step_name(target.step)}"
    path = target.run.evals / kind / f"{target.label}{step}-{key}.json"
    if path.exists() and (stored := read_result(path, form)) is not None:
        return stored
    result: Any = measure()
    try:
        target.run.check_output(path.parent)
        if weights_digest(target.path) != weights:
            warn(f"result not cached: {target.path} changed while it was evaluated")
        else:
            write_atomically(path, json.dumps(asdict(result), indent=2) + "\n")
    except (UserError, WriteFailed, OSError) as error:
        warn(f"result not cached: {error}")
    return result  # type: ignore[no-any-return]  # a Result


def read_result(path: Path, form: type[Result]) -> Result | None:
    """Return a stored result, or None if another version with other fields wrote it."""
    document = read_json(path)
    known = {each.name: each.default is MISSING for each in fields(form)}  # type: ignore[arg-type]  # a dataclass
    if not document.keys() <= known.keys() or any(known[key] for key in known.keys() - document):
        return None
    try:
        return TypeAdapter(form).validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(
            f"{path}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}",
            hint="delete the file; llmtrain eval will measure it again",
        ) from None


def stored_results(run: RunFolder) -> list[EvalResult]:
    """Return the cached losses of the weights still in a run, raw first, then by label and step."""
    paths = sorted(run.evals.glob("[!.]*.json"))
    read = [read_result(path, EvalResult) for path in paths]
    current = [result for result in read if result is not None and _is_current(run, result)]
    name = run.path.resolve().name  # the run may have been renamed since the measurement
    results = [
        replace(each, run=name, path=str(path), discarded=bool(discarded_inputs(path, run)))
        for each in current
        for path in [_folder(run, each)]
    ]
    raw = {_comparable_key(result): result.loss for result in results if result.label == RAW}
    return sorted(
        (result.with_delta(raw.get(_comparable_key(result))) for result in results),
        key=lambda result: (result.label != RAW, result.label, result.step or 0),
    )


def _comparable_key(result: EvalResult) -> tuple[object, ...]:
    windows = result.data, result.split, result.tokens, result.block_size, result.precision
    return result.step, *windows


def _is_current(run: RunFolder, result: EvalResult) -> bool:
    """Return whether the measured weights are still there, or their folder is gone."""
    folder = _folder(run, result)
    if result.step is None:
        return False
    return not folder.is_dir() or is_unchanged(folder, Digest.parse(result.weights))


def _folder(run: RunFolder, result: EvalResult) -> Path:
    step = result.step or 0
    return run.snapshot(step) if result.label == RAW else run.average(result.label, step)
