"""The one set of weights that `generate` and `export` use.

Why by the measured loss on identical tokens: an average can be worse than the raw weights, for
example early in training.
"""

import shlex
from dataclasses import dataclass

from llmtrain.checkpoints.resolve import Target, find_targets, resolve
from llmtrain.evaluation.curves import Windows, measured_curves
from llmtrain.evaluation.weights import discarded_inputs
from llmtrain.storage.run_folder import RAW, RunFolder


@dataclass(frozen=True)
class Selection:
    """The selected weights, and the pair that `generate --compare` shows."""

    weights: Target
    raw: Target | None
    """Raw weights of the same step."""
    average: Target | None
    """The selected average, or the best one of the same step."""
    reason: str
    """Why these weights, and what might be better; empty for a folder of weights."""


def choose_weights(name: str | None) -> Selection:
    """Return one set of weights for a run, folder or hub name; None means the newest run.

    For a run, these are the best measured weights of its newest averaged step. Losses are compared
    on the windows on which most of these weights were measured. Without any loss, the
    first average is selected, or the snapshot if there is none. Averages of discarded snapshots are
    left out.
    """
    targets = find_targets(name)
    found, last = resolve(name), targets[-1]
    newest = [target for target in targets if target.step == last.step]
    raw = next((target for target in newest if target.label == RAW), None)
    averages = [target for target in newest if target.label != RAW]
    if not isinstance(found, RunFolder):
        return Selection(last, raw, averages[-1] if averages else None, "")
    if raw is not None:
        averages = [each for each in averages if not discarded_inputs(each.path, found)]
    measured = _losses(found)
    windows = _windows_with_most(measured, newest)
    losses = measured.get(windows, {}) if windows else {}
    candidates = [*averages, *([raw] if raw else [])]

    def rank(target: Target) -> float:
        return losses.get((target.label, target.step), float("inf"))

    best = min(candidates, key=rank)
    reason = _reason(found, best, candidates, windows, losses)
    return Selection(best, raw, min(averages, key=rank, default=None), reason)


Losses = dict[tuple[str, int | None], float]
"""Losses on the same windows by label and step."""


def _losses(run: RunFolder) -> dict[Windows, Losses]:
    return {
        windows: {(label, step): loss for label, curve in curves.items() for step, loss in curve}
        for windows, curves in measured_curves(run).items()
    }


def _windows_with_most(measured: dict[Windows, Losses], targets: list[Target]) -> Windows | None:
    """Return the windows on which most targets were measured; on a tie, those with more tokens."""

    def size(windows: Windows) -> tuple[int, int]:
        known = sum((target.label, target.step) in measured[windows] for target in targets)
        return known, windows.tokens or 0

    return max((each for each in measured if size(each)[0]), key=size, default=None)


def _reason(
    run: RunFolder,
    best: Target,
    candidates: list[Target],
    windows: Windows | None,
    losses: Losses,
) -> str:
    """Return one line: the loss of the selected weights, and what might be better."""
    command = f"llmtrain eval {shlex.quote(str(run.path))}"
    if windows is None:
        return f"newest step, not measured yet: run {command}"
    loss = losses[best.label, best.step]
    known = [each for each in candidates if (each.label, each.step) in losses]
    rank = f"the lowest of {len(known)}" if len(known) > 1 else "the only one"
    parts = [f"loss {loss:.4f} on {windows}, {rank} measured at this step"]
    if unknown := [each.label for each in candidates if each not in known]:
        parts.append(f"not measured yet: {', '.join(unknown)} (run {command})")
    (label, step), lowest = min(losses.items(), key=lambda item: item[1])
    if lowest < loss and step is not None:
        folder = run.snapshot(step) if label == RAW else run.average(label, step)
        if folder.is_dir():
            parts.append(f"{folder} is better, with {lowest:.4f}")
    return "; ".join(parts)
