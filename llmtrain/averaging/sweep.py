"""Many averages of one run evaluated without writing any: which window, which spacing, which method.

Why: the best window is a property of the run, and guessing it costs more than measuring it. All
candidates of a step are summed in one pass over the snapshots, into memory, and evaluated there.

    result = sweep(run, parse_sweep("window=3,5,10 every=200,400,1000"))
    result.best.request, result.best.losses
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmtrain.averaging.average import check_claims, unique_inputs
from llmtrain.averaging.merge import WeightedSum, Write, merge
from llmtrain.averaging.request import OPTIONS, AverageRequest, make_specs
from llmtrain.averaging.spec import AverageSpec, MergeOptions
from llmtrain.checkpoints.checkpoint import Checkpoint
from llmtrain.checkpoints.gpt2_folder import load_model, transpose_conv1d
from llmtrain.checkpoints.series import Input, Series, require_same_tensors, run_series
from llmtrain.checkpoints.tensors import StoredArray
from llmtrain.checkpoints.windows import describe_steps
from llmtrain.config.loading import load_config
from llmtrain.config.schema import RunConfig
from llmtrain.data.cache import local_folder
from llmtrain.data.token_data import open_data
from llmtrain.errors import UserError
from llmtrain.evaluation.loss import evaluate
from llmtrain.model.gpt import GPT
from llmtrain.model.tokenizer import load_tokenizer
from llmtrain.runtime.device import keep_freed_memory, resolve_device, resolve_precision
from llmtrain.storage.run_folder import RAW, RunFolder

MEMORY = 4 << 30
"""Bytes of averages held at a time; more are made in further passes over the snapshots."""

POINTS = 12
"""Steps at which candidates are compared, unless all are asked for."""

_NUMBERS: dict[str, Callable[[str], Any]] = {
    "window": int,
    "every": int,
    "start": int,
    "decay": float,
    "half_life": float,
    "blend": float,
    "sigma_rel": float,
    "method": str,
    "shape": str,
}

_Weights = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


@dataclass(frozen=True)
class Candidate:
    """One way of averaging, and its validation loss by step (nats per token)."""

    label: str
    request: AverageRequest | None
    """None: the raw weights."""
    losses: dict[int, float]


@dataclass(frozen=True)
class SweepResult:
    """Raw weights and all candidates, on the same validation tokens."""

    raw: Candidate
    candidates: list[Candidate]
    """Best first: by the loss at the last step that each has."""
    skipped: list[str]
    """Candidates for which the run has no window."""
    tokens: int
    """Validation tokens predicted in each evaluation."""

    @property
    def best(self) -> Candidate:
        """The candidate with the lowest loss at the newest step that any has."""
        return self.candidates[0]


def parse_sweep(text: str) -> list[AverageRequest]:
    """Every combination of `key=a,b key=c,d`, without what a method does not take.

    Raises:
        UserError: not of that form, an unknown key, or a value of the wrong kind.
    """
    choices: dict[str, list[Any]] = {"method": ["lawa"]}
    for part in text.split():
        key, equals, values = part.partition("=")
        name = {"from": "start"}.get(key.replace("-", "_"), key.replace("-", "_"))
        if not equals or name not in _NUMBERS:
            wrong = f"has no key {key!r}" if equals else f"{part!r} is not key=value,value"
            known = ", ".join("from" if n == "start" else n.replace("_", "-") for n in _NUMBERS)
            raise UserError(f"--sweep {wrong}", hint=f"keys: {known}")
        if name in choices and (name != "method" or "method=" in text.replace(part, "", 1)):
            raise UserError(f"--sweep has {key} twice", hint=f"{key}=a,b holds several values")
        try:
            choices[name] = [_NUMBERS[name](value) for value in values.split(",")]
        except ValueError:
            raise UserError(
                f"--sweep {part!r} has a value that is no number", hint="window=3,5,10"
            ) from None
    taken = set().union(*(OPTIONS.get(method, set(choices)) for method in choices["method"])) | {
        "method"
    }
    if unused := set(choices) - taken:
        raise UserError(
            f"--sweep: {', '.join(sorted(unused))} is nothing that {', '.join(choices['method'])} takes",
            hint="add the method that takes it, such as method=ema for decay",
        )
    requests: list[AverageRequest] = []
    for combination in itertools.product(*choices.values()):
        asked: dict[str, Any] = dict(zip(choices, combination, strict=True))
        takes = OPTIONS.get(asked["method"], set(choices)) | {"method"}
        request = AverageRequest(**{key: value for key, value in asked.items() if key in takes})
        if request not in requests:
            requests.append(request)
    return requests


def sweep(
    run: RunFolder,
    requests: Sequence[AverageRequest],
    *,
    at: str | int | None = None,
    data: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SweepResult:
    """Evaluate each request at the same steps, and the raw weights beside them.

    Args:
        run: whose snapshots and validation data.
        requests: the candidates.
        at: `all`: at every snapshot; `last`, or a step: there alone; None: at `POINTS` steps.
        data: folder of token shards; default: the run's.
        progress: called with evaluations done and in all.

    Raises:
        UserError: no candidate has a window (at that step), or a request is impossible.
    """
    series, config = run_series(run), load_config(run.config)
    plans, skipped = _plans(series, requests)
    steps = _compared_steps(series.steps, plans, at)
    jobs = [
        *(AverageSpec(RAW, RAW, (series.inputs[step],), (1.0,), run.path) for step in steps),
        *(plan for of_request in plans.values() for plan in of_request if plan.step in steps),
    ]
    jobs.sort(key=lambda job: job.step)
    inputs = unique_inputs([job for job in jobs if job.audited])
    check_claims(series, inputs, MergeOptions(), audited=True)
    measure = _Evaluator(config, series.inputs[steps[-1]].open().folder, data)
    losses: dict[str, dict[int, float]] = {}
    for done, (job, weights) in enumerate(_averages(jobs), start=1):
        losses.setdefault(job.label, {})[job.step] = measure.loss(weights)
        if progress is not None:
            progress(done, len(jobs))
    labels = _labels(plans)
    found = [
        Candidate(label, request, losses[label]) for label, request in labels if label in losses
    ]
    skipped += [
        f"{label} has no window that ends there" for label, _ in labels if label not in losses
    ]
    found.sort(
        key=lambda candidate: (-max(candidate.losses), candidate.losses[max(candidate.losses)])
    )
    return SweepResult(Candidate(RAW, None, losses[RAW]), found, skipped, measure.tokens)


def _plans(
    series: Series, requests: Sequence[AverageRequest]
) -> tuple[dict[AverageRequest, list[AverageSpec]], list[str]]:
    """All windows of each request, and why some have none."""
    plans, skipped = {}, []
    for request in requests:
        try:
            plans[request] = make_specs(series, replace(request, at="all"))
        except UserError as error:
            if "has no" not in str(error):
                raise
            skipped.append(str(error))
    if not plans:
        raise UserError(
            "no candidate has a window:\n  " + "\n  ".join(skipped),
            hint="smaller window= or every=",
        )
    return plans, skipped


def _labels(plans: Mapping[AverageRequest, list[AverageSpec]]) -> list[tuple[str, AverageRequest]]:
    return [(of_request[-1].label, request) for request, of_request in plans.items()]


def _compared_steps(
    steps: Sequence[int], plans: Mapping[AverageRequest, list[AverageSpec]], at: str | int | None
) -> list[int]:
    """The steps that `at` means; None: `POINTS` evenly spaced ones from the first window's end to the last's."""
    ends = sorted({plan.step for of_request in plans.values() for plan in of_request})
    if at == "all":
        return list(steps)
    if at is not None:
        end = ends[-1] if at == "last" else at
        if end not in ends:
            raise UserError(
                f"no candidate has a window that ends at step {end:,}",
                hint=f"{describe_steps(ends)} do",
            )
        return [end]
    if len(ends) <= POINTS:
        return ends
    return sorted({ends[round(i * (len(ends) - 1) / (POINTS - 1))] for i in range(POINTS)})


def _averages(jobs: Sequence[AverageSpec]) -> Iterator[tuple[AverageSpec, _Weights]]:
    """Each average in memory, in groups that fit there; a group reads each of its snapshots once."""
    opened: dict[Input, Checkpoint] = {}
    position = 0
    while position < len(jobs):
        size = 4 * sum(spec.count for spec in jobs[position].inputs[-1].open().tensors.values())
        group = jobs[position : position + max(1, MEMORY // size)]
        inputs = unique_inputs(group)
        opened = {source: opened.get(source) or source.open() for source in inputs}
        checkpoints = [opened[source] for source in inputs]
        require_same_tensors(checkpoints)
        index = {source: i for i, source in enumerate(inputs)}
        results: list[_Weights] = [
            {
                name: np.empty(spec.count, np.float32)
                for name, spec in checkpoints[-1].tensors.items()
            }
            for _ in group
        ]
        mixtures = [
            WeightedSum(tuple(index[i] for i in job.inputs), job.weights, job.decays)
            for job in group
        ]
        merge(checkpoints, mixtures, [_into(weights) for weights in results])
        for job, weights in zip(group, results, strict=True):
            shapes = checkpoints[-1].tensors
            yield job, {name: array.reshape(shapes[name].shape) for name, array in weights.items()}
        position += len(group)


def _into(weights: _Weights) -> Write:
    def write(name: str, start: int, raw: StoredArray) -> None:
        weights[name][start : start + len(raw)] = raw

    return write


class _Evaluator:
    """One model, into which weights are put to be measured on the run's validation tokens."""

    def __init__(self, config: RunConfig, folder: Path, data: Path | None) -> None:
        self._config = config
        self._device = resolve_device(config.train.device)
        self._model: GPT = load_model(folder).to(self._device)
        opened = open_data(data or local_folder(config.data.path))
        self._reader = opened.reader("val")
        self._token_bytes = load_tokenizer(opened.tokenizer).token_bytes()
        self.tokens = 0

    def loss(self, weights: _Weights) -> float:
        """Nats per token of `weights`, in Hugging Face's layout."""
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                held = torch.from_numpy(
                    weights[name if name in weights else name.removeprefix("transformer.")]
                )
                parameter.copy_(transpose_conv1d(name, held))
        with keep_freed_memory(self._device):
            result = evaluate(
                self._model,
                self._reader,
                self._token_bytes,
                block_size=self._config.data.block_size,
                batch=self._config.eval.batch,
                device=self._device,
                precision=resolve_precision(self._config.train.precision, self._device),
                limit=self._config.eval.tokens,
            )
        self.tokens = result.tokens
        return result.loss
