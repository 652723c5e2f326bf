"""Validation losses of a run by step, from the log of training and the results of `eval`.

Why by windows: a loss depends on the tokens, the context and the precision. Losses on different
windows are never compared.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llmtrain.config.loading import load_config
from llmtrain.data.manifest import MANIFEST_FILE, read_manifest
from llmtrain.errors import UserError
from llmtrain.evaluation.results import EvalResult, stored_results
from llmtrain.storage.json_files import read_events, read_json
from llmtrain.storage.run_folder import RAW, RunFolder

Curve = list[tuple[int, float]]
"""Points (step, loss in nats per token), sorted by step."""


@dataclass(frozen=True)
class Windows:
    """Windows and precision of a validation loss; losses with equal `Windows` are comparable."""

    data: str
    """SHA-256 of the manifest, or the folder if it no longer exists."""
    block_size: int
    precision: str
    tokens: int | None
    """Predicted tokens; None in logs of earlier versions."""

    def __str__(self) -> str:
        count = "an unknown number of" if self.tokens is None else f"{self.tokens:,}"
        return f"{count} tokens in {self.precision}"


def loss_curves(run: RunFolder) -> dict[str, Curve]:
    """Return the validation loss by step for raw weights, first, and each average.

    All were measured on the same windows: see `main_windows`.
    """
    measured = measured_curves(run)
    (windows,) = main_windows([measured])
    return measured[windows] if windows else {}


def measured_curves(run: RunFolder) -> dict[Windows, dict[str, Curve]]:
    """Return the validation losses of training, first, and of `eval`, by windows, label and step.

    Averages of discarded snapshots are left out.
    """
    found: dict[Windows, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    during = partial(Windows, *_training_windows(run))
    for event in read_events(run.metrics):
        for key, loss in event.items():
            if key.startswith("val/loss") and loss is not None and math.isfinite(loss):
                label = key.removeprefix("val/loss").lstrip("/") or RAW
                found[during(event.get("val/tokens"))][label][event["step"]] = loss
    for result in stored_results(run):
        if result.step is not None and result.split == "val" and not result.discarded:
            found[_windows_of(result)][result.label][result.step] = result.loss
    return {windows: _sorted_curves(curves) for windows, curves in found.items()}


def _training_windows(run: RunFolder) -> tuple[str, int, str]:
    """Return data, block size and precision of the losses that training logs.

    If the data or environment.json is missing, take the values of an `eval` result.
    """
    config = load_config(run.config)
    results = [result for result in stored_results(run) if result.split == "val"]
    folder = Path(config.data.path)
    data = [result.data for result in results]
    if (folder / MANIFEST_FILE).is_file():
        with suppress(UserError):  # a damaged manifest does not affect the losses
            data.insert(0, read_manifest(folder).sha256)
    precision = read_json(run.environment).get("precision") if run.environment.exists() else None
    precisions = [precision, *(result.precision for result in results), config.train.precision]
    known = next(each for each in precisions if each)
    return (data or [config.data.path])[0], config.data.block_size, str(known)


def _windows_of(result: EvalResult) -> Windows:
    return Windows(result.data, result.block_size, result.precision, result.tokens)


def _sorted_curves(curves: dict[str, dict[int, float]]) -> dict[str, Curve]:
    labels = sorted(curves, key=lambda label: (label != RAW, label))
    return {label: sorted(curves[label].items()) for label in labels}


def main_windows(
    measured: Sequence[Mapping[Windows, Mapping[str, Curve]]],
) -> list[Windows | None]:
    """Return the windows to show for each run: shared by all runs, or else its own.

    Among several, those with the most tokens over all losses win, but never with fewer tokens than
    training used: a quick `eval` of all snapshots does not replace the curve of training.
    """
    shared = set.intersection(*(set(each) for each in measured))
    least = min((_tokens_of(next(iter(each), None)) for each in measured), default=0)

    def size(windows: Windows) -> tuple[bool, int, int]:
        curves = [curve for each in measured for curve in each.get(windows, {}).values()]
        count, tokens = sum(map(len, curves)), _tokens_of(windows)
        return tokens >= least, count * tokens, count

    return [max(shared or each, key=size, default=None) for each in measured]


def _tokens_of(windows: Windows | None) -> int:
    return (windows.tokens if windows else None) or 0


def newest_results(run: RunFolder) -> list[EvalResult]:
    """Return the newest result of raw weights and of each average, for each set of windows."""
    results = [result for result in stored_results(run) if result.split == "val"]
    newest = {(_windows_of(result), result.label): result for result in results}  # last: newest
    return sorted(newest.values(), key=lambda each: (-each.tokens, each.data, each.precision))
