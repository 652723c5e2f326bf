"""The sweep: evaluate many averages of one run without writing them, and report what each saves.

The best window depends on the run. One pass over the snapshots sums all candidates of a group in
memory.
"""

import csv
import io
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmtrain.averaging import audit
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.merge import merge
from llmtrain.averaging.request import AverageRequest, MergeOptions, find_method
from llmtrain.averaging.spec import AverageSpec, unique_inputs, weighted_sums
from llmtrain.checkpoints.gpt2_folder import load_model, transpose_conv1d
from llmtrain.checkpoints.series import (
    MissingCheckpoints,
    Series,
    require_same_tensors,
    run_series,
)
from llmtrain.checkpoints.tensors import StoredArray
from llmtrain.checkpoints.windows import describe_steps
from llmtrain.config.loading import load_config
from llmtrain.config.schema import RunConfig
from llmtrain.data.cache import local_folder
from llmtrain.data.shard_check import require_intact
from llmtrain.data.token_data import open_data
from llmtrain.errors import RunFailed, UserError, printable
from llmtrain.evaluation.loss import LossResult, evaluate
from llmtrain.model.tokenizer import load_tokenizer
from llmtrain.runtime.device import keep_freed_memory, resolve_device, resolve_precision
from llmtrain.storage.commit import write_atomically
from llmtrain.storage.json_files import read_events
from llmtrain.storage.run_folder import RAW, RunFolder

MEMORY = 4 << 30
"""Bytes of averages held at once; larger sweeps make further passes over the snapshots."""

POINTS = 12
"""Number of steps at which candidates are compared by default."""

_PARSERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("window", "every", "start"), int),
    **dict.fromkeys(("decay", "half_life", "blend", "sigma_rel"), float),
    **dict.fromkeys(("method", "shape"), str),
}

_Weights = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


@dataclass(frozen=True)
class Candidate:
    """One average and its validation loss by step, in nats per token."""

    label: str
    request: AverageRequest | None
    """None: the raw weights."""
    losses: dict[int, float]


@dataclass(frozen=True)
class SweepResult:
    """Raw weights and all candidates, on the same validation tokens."""

    raw: Candidate
    candidates: list[Candidate]
    """Best first, by the loss at the last step of each."""
    skipped: list[str]
    """Candidates without a window in this run."""
    tokens: int
    """Validation tokens predicted in each evaluation."""

    @property
    def best(self) -> Candidate:
        """Candidate with the lowest loss at the newest step."""
        return self.candidates[0]


@dataclass(frozen=True)
class SummaryRow:
    """One candidate at its newest step."""

    label: str
    step: int
    loss: float
    delta: float
    """Loss minus the raw loss of the same step."""
    best: bool
    reached: int | None
    """First compared step whose loss is at most the last raw loss; None: never."""
    steps_saved: int | None
    """Steps from there to the first one at which the raw weights reach that loss."""
    tokens_saved: int | None
    hours_saved: float | None
    """Training time, from the run's metrics; None without metrics."""


def parse_sweep(text: str) -> list[AverageRequest]:
    """Return every combination of `key=a,b key=c,d`, each with the options its method takes."""
    parsed = [_parse_key(part) for part in text.split()]
    choices = {"method": ["lawa"]} | dict(parsed)
    if len(dict(parsed)) < len(parsed):
        raise UserError("--sweep has a key twice", hint="give several values as key=a,b")
    accepted = {name: find_method(name).options | {"method"} for name in choices["method"]}
    if unused := set(choices).difference(*accepted.values()):
        raise UserError(
            f"--sweep: {', '.join(choices['method'])} does not take {', '.join(sorted(unused))}",
            hint="add a method that does, such as method=ema for decay",
        )
    requests = []
    for values in itertools.product(*choices.values()):
        given = dict(zip(choices, values, strict=True))
        taken = accepted[given["method"]]
        requests.append(AverageRequest(**{k: v for k, v in given.items() if k in taken}))
    return list(dict.fromkeys(requests))


def _parse_key(part: str) -> tuple[str, list[Any]]:
    key, _, values = part.partition("=")
    name = "start" if key == "from" else key.replace("-", "_")
    try:
        return name, [_PARSERS[name](value) for value in values.split(",")]
    except (KeyError, ValueError):
        known = ", ".join("from" if n == "start" else n.replace("_", "-") for n in _PARSERS)
        raise UserError(
            f"--sweep {part!r:.100} is not a known key with values, such as window=3,5",
            hint=f"use the keys {known}",
        ) from None


def sweep(
    run: RunFolder,
    requests: Sequence[AverageRequest],
    *,
    at: str | int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SweepResult:
    """Evaluate each request and the raw weights at the same steps.

    `at` selects `all` snapshots, the `last` window, or one step; None: `POINTS` steps.
    """
    series, config = run_series(run), load_config(run.config)
    specs, skipped = _specs(series, requests)
    steps = _compared_steps(series.steps, specs, at)
    jobs = [
        *(AverageSpec(RAW, RAW, (series.inputs[step],), (1.0,), run.path) for step in steps),
        *(spec for each in specs.values() for spec in each if spec.step in steps),
    ]
    jobs.sort(key=lambda job: job.step)
    inputs = unique_inputs([job for job in jobs if job.audited])
    audit.check_metadata(series, inputs, MergeOptions())
    measure = _evaluator(config, series.inputs[steps[-1]].open().folder)
    losses: dict[str, dict[int, float]] = {}
    for done, (job, weights) in enumerate(_averages(jobs), start=1):
        measured = measure(weights)
        if not math.isfinite(measured.loss):
            raise RunFailed(
                f"the loss of {job.label} at step {job.step:,} is {measured.loss}",
                hint="leave it out with --at, or check the snapshots: llmtrain inspect RUN",
            )
        losses.setdefault(job.label, {})[job.step] = measured.loss
        progress(done, len(jobs))
    candidates = []
    for request, each in specs.items():
        label = each[-1].label
        if label in losses:
            candidates.append(Candidate(label, request, losses[label]))
        else:
            skipped.append(f"{label} has no window that ends there")
    candidates.sort(key=lambda each: (-max(each.losses), each.losses[max(each.losses)]))
    return SweepResult(Candidate(RAW, None, losses[RAW]), candidates, skipped, measured.tokens)


def _specs(
    series: Series, requests: Sequence[AverageRequest]
) -> tuple[dict[AverageRequest, list[AverageSpec]], list[str]]:
    """Return all windows of each request, and a reason for each request without any."""
    specs, skipped = {}, []
    for request in requests:
        try:
            specs[request] = make_specs(series, replace(request, at="all"))
        except MissingCheckpoints as error:
            skipped.append(str(error))
    if not specs:
        raise UserError(
            "no candidate has a window:\n  " + "\n  ".join(skipped),
            hint="use a smaller window= or every=",
        )
    return specs, skipped


def _compared_steps(
    steps: Sequence[int], specs: Mapping[AverageRequest, list[AverageSpec]], at: str | int | None
) -> list[int]:
    """Return the steps that `at` selects; None: evenly spaced ends of windows."""
    ends = sorted({spec.step for each in specs.values() for spec in each})
    if at == "all":
        return list(steps)
    if at is not None:
        end = ends[-1] if at == "last" else at
        if end not in ends:
            raise UserError(
                f"no candidate has a window that ends at step {end:,}",
                hint=f"use --at with one of {describe_steps(ends)}",
            )
        return [int(end)]
    if len(ends) <= POINTS:
        return ends
    return sorted({ends[round(i * (len(ends) - 1) / (POINTS - 1))] for i in range(POINTS)})


def _averages(jobs: Sequence[AverageSpec]) -> Iterator[tuple[AverageSpec, _Weights]]:
    """Yield each average in memory; groups that fit in `MEMORY` read each snapshot once."""
    opened = {source: source.open() for source in unique_inputs(jobs)}
    require_same_tensors(list(opened.values()))
    tensors = opened[jobs[-1].inputs[-1]].tensors
    count = max(1, MEMORY // (4 * sum(spec.count for spec in tensors.values())))
    for first in range(0, len(jobs), count):
        group = jobs[first : first + count]
        inputs = unique_inputs(group)
        results = [
            {name: np.empty(spec.shape, np.float32) for name, spec in tensors.items()}
            for _ in group
        ]
        writes = [partial(_store, weights) for weights in results]
        merge([opened[source] for source in inputs], weighted_sums(group, inputs), writes)
        yield from zip(group, results, strict=True)


def _store(weights: _Weights, name: str, start: int, raw: StoredArray) -> None:
    weights[name].reshape(-1)[start : start + len(raw)] = raw


def _evaluator(config: RunConfig, folder: Path) -> Callable[[_Weights], LossResult]:
    """Return a function that measures weights, in Hugging Face's layout, on the validation data."""
    device = resolve_device(config.train.device)
    model = load_model(folder).to(device)
    data = open_data(local_folder(config.data.path))
    require_intact(data.files["val"])
    loss = partial(
        evaluate,
        model,
        data.reader("val"),
        load_tokenizer(data.tokenizer).token_bytes(),
        block_size=config.data.block_size,
        batch=config.eval.batch,
        device=device,
        precision=resolve_precision(config.train.precision, device),
        limit=config.eval.tokens,
    )

    def measure(weights: _Weights) -> LossResult:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                stored = weights.get(name, weights.get(name.removeprefix("transformer.")))
                parameter.copy_(transpose_conv1d(name, torch.from_numpy(stored)))
        with keep_freed_memory(device):
            return loss()

    return measure


def summary(result: SweepResult, run: RunFolder) -> list[SummaryRow]:
    """Return a row for each candidate, best first."""
    tokens_per_step = load_config(run.config).tokens_per_step
    clock = sorted((e["step"], e["seconds"]) for e in read_events(run.metrics) if "seconds" in e)
    raw = result.raw.losses
    target = raw[max(raw)]
    # Raw weights fluctuate: they may have reached their last loss long before.
    raw_reached = min(step for step, loss in raw.items() if loss <= target)
    rows = []
    for candidate in result.candidates:
        losses, step = candidate.losses, max(candidate.losses)
        reached = min((s for s, loss in losses.items() if loss <= target), default=None)
        saved, hours = None, None
        if reached is not None:
            saved = raw_reached - reached
            if clock:
                logged, seconds = np.array(clock).T
                begin, end = np.interp([reached, raw_reached], logged, seconds)
                hours = float(end - begin) / 3600.0
        rows.append(
            SummaryRow(
                label=candidate.label,
                step=step,
                loss=losses[step],
                delta=losses[step] - raw[step],
                best=candidate is result.best,
                reached=reached,
                steps_saved=saved,
                tokens_saved=None if saved is None else saved * tokens_per_step,
                hours_saved=hours,
            )
        )
    return rows


def write_csv(result: SweepResult, path: Path) -> None:
    """Write one line per step: raw and each candidate, empty without a window."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [result.raw, *result.candidates]
    writer.writerow(["step", *(candidate.label for candidate in columns)])
    for step in sorted(result.raw.losses):
        writer.writerow([step, *(candidate.losses.get(step, "") for candidate in columns)])
    write_atomically(path, text.getvalue())


def draw(result: SweepResult, path: Path, title: str) -> None:
    """Plot loss against step for raw and each candidate, with the best highlighted."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()

    def line(candidate: Candidate, label: str, color: Any, width: float) -> None:
        points = zip(*sorted(candidate.losses.items()), strict=True)
        axes.plot(*points, label=label, color=color, linewidth=width, marker="o", markersize=3)

    line(result.raw, RAW, "black", 1.6)
    shades = colormaps["viridis"](np.linspace(0.1, 0.9, max(len(result.candidates), 2)))
    for shade, candidate in zip(shades[1:], result.candidates[1:], strict=False):
        line(candidate, candidate.label, shade, 1.0)
    line(result.best, f"{result.best.label} (best)", "#D55E00", 2.2)
    axes.set_title(printable(title), loc="left", parse_math=False)
    axes.set(xlabel="step", ylabel="validation loss (nats per token)")
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    png = io.BytesIO()
    with warnings.catch_warnings():
        # Characters without a glyph are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(png, format="png")
    write_atomically(path, png.getvalue())
