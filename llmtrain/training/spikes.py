"""Spikes and non-finite numbers: detected within the step, before the weights change.

Why on the device: the loop does not block, and all ranks decide alike from the same reduced loss
and norm. The host reads events only when it reads numbers anyway (`drain`). If the policy is to
stop or rewind, all updates until then are skipped.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llmtrain.config.schema import RunConfig
from llmtrain.errors import RunFailed

MAX_SKIPPED_IN_A_ROW = 100
"""Skipped updates after which the run fails: the weights no longer give a finite loss."""

LOWER_RATE_HINT = "branch at a lower rate: --branch NAME --from STEP --set optimizer.lr=RATE"
_SCALE = 1.4826  # ratio of standard deviation to median absolute deviation (normal distribution)
_UPPER = 0.8413  # share of a normal distribution below one standard deviation above its median
_FLOOR = 1e-3  # smallest scale relative to the median: noise in a flat loss is not a spike


@dataclass(frozen=True)
class SpikeEvent:
    """A step whose loss or gradient norm is not finite, or far above those before it."""

    step: int
    kind: str
    """`nonfinite` or `spike`."""
    loss: float
    grad_norm: float
    z_loss: float
    """Robust z-score of the loss; NaN until the window is full."""
    z_grad_norm: float
    action: Literal["log", "skip", "stop", "rewind"]

    def event(self) -> dict[str, Any]:
        """Return the event for `metrics.jsonl`."""
        return {"incident" if key == "kind" else key: v for key, v in asdict(self).items()}

    def reason(self) -> dict[str, Any]:
        """Return its numbers for the record of a rewind; None for those that are not finite."""
        loss, norm = (x if math.isfinite(x) else None for x in (self.loss, self.grad_norm))
        return {"reason": self.kind, "loss": loss, "grad_norm": norm}

    def __str__(self) -> str:
        kind = "non-finite numbers" if self.kind == "nonfinite" else "spike"
        numbers = f"loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}"
        if self.kind == "spike":
            numbers += f", {max(self.z_loss, self.z_grad_norm):.1f} deviations above the median"
        skipped = {"log": "", "rewind": ": update skipped, rewinding"}
        return f"{self.step:>9,}  {kind} ({numbers}){skipped.get(self.action, ': update skipped')}"


def robust_z(values: Tensor, history: Tensor) -> Tensor:
    """Return the distance of values (n,) above the medians of history (n, window), in deviations.

    The deviation is the larger of the scaled median absolute deviation and the distance from the
    median to the 84th percentile. A NaN in the history, as before it is full, makes the result NaN.

    Why the percentile: gradient norms that grow, or that are often twice as large as usual, spread
    upwards only. The median deviation alone raised ten false alarms in the demo.
    """
    median = history.median(dim=1).values
    deviation = (history - median[:, None]).abs().median(dim=1).values
    upper = history.sort(dim=1).values[:, int(_UPPER * (history.shape[1] - 1))] - median
    scale = torch.maximum(_SCALE * deviation, upper)
    return (values - median) / torch.maximum(scale, _FLOOR * median.abs())


class SpikeDetector:
    """Checks the loss and gradient norm of each step, and collects events for the host."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        """Start with an empty history on the device of the numbers."""
        self._spikes, self._on_nonfinite = config.spikes, config.train.on_nonfinite
        self.history = torch.full((2, config.spikes.window), math.nan, device=device)
        """Ring buffer of the last losses and gradient norms: shape (2, window)."""
        self._halted = torch.zeros((), dtype=torch.bool, device=device)
        self._pending: list[tuple[int, Tensor]] = []
        self._skipped_in_a_row = 0

    def check(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Return whether to skip the update of step `step`: a bool on the device, shape ()."""
        values = torch.stack([loss.detach(), norm.detach()]).float()
        finite = values.isfinite()
        z = robust_z(values, self.history)
        nonfinite, spike = ~finite.all(), finite.all() & (z > self._spikes.threshold).any()
        slot = step % self.history.shape[1]
        # A non-finite value would make the median NaN; keep the value that it would replace.
        self.history[:, slot] = torch.where(finite, values, self.history[:, slot])
        if self._on_nonfinite != "skip":
            self._halted |= nonfinite
        if self._spikes.action == "rewind":
            self._halted |= spike
        skip = nonfinite | self._halted
        if self._spikes.action == "skip":
            skip = skip | spike
        flags = torch.stack([nonfinite, spike, skip]).float()
        self._pending.append((step, torch.cat([values, z, flags])))
        return skip

    def drain(self) -> list[SpikeEvent]:
        """Return the events since the last call, up to the first that stops or rewinds."""
        if not self._pending:
            return []
        steps, rows = zip(*self._pending, strict=True)
        self._pending.clear()
        events = []
        for step, row in zip(steps, torch.stack(rows).tolist(), strict=True):
            loss, norm, z_loss, z_norm, nonfinite, spike, skip = row
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if skip else 0
            action = self._on_nonfinite if nonfinite else self._spikes.action if spike else "ignore"
            if action == "ignore":
                continue
            kind = "nonfinite" if nonfinite else "spike"
            events.append(SpikeEvent(step, kind, loss, norm, z_loss, z_norm, action))
            if action in ("stop", "rewind"):
                return events
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            skipped = f"the last {self._skipped_in_a_row} updates up to step {steps[-1]:,}"
            problem = f"{skipped} were skipped because of spikes or non-finite numbers"
            raise RunFailed(problem, hint=LOWER_RATE_HINT)
        return events

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of the training checkpoint; call `drain` first."""
        return {"history": self.history, "held_in_a_row": torch.tensor(self._skipped_in_a_row)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state`; a branch with another window starts with an empty history."""
        history = state.get("history")
        self.history.fill_(math.nan)
        self._skipped_in_a_row = 0
        if history is not None and history.shape == self.history.shape:
            self.history.copy_(history)
            self._skipped_in_a_row = int(state["held_in_a_row"])
        self._halted.zero_()
        self._pending.clear()
