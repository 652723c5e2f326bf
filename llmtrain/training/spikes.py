"""Non-finite numbers and spikes: noticed in the step where they happen, before the weights see them.

Why on the device: whether a step is held back is decided by tensors alone, so the loop does not wait
for the device, and every rank, seeing the same reduced loss and norm, decides alike. The host learns
of it when it reads numbers anyway (`drain`); where a policy stops or rewinds, every step after the
incident is held back until then, so the weights stay those of the step before it.

    watch = SpikeDetector(config, device); hold = watch.judge(step, loss, norm); incidents = watch.drain()
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llmtrain.config.schema import RunConfig
from llmtrain.errors import RunFailed

MAX_HELD_IN_A_ROW = 100
"""So many steps without an update are no accident: the weights themselves give no finite loss any more."""

_SCALE = 1.4826
"""Median absolute deviation to standard deviation, for a normal distribution."""
_FLOOR = 1e-3
"""Smallest scale as a share of the median: a loss that hardly moves must not make a spike of its noise."""


@dataclass(frozen=True)
class SpikeEvent:
    """A step whose numbers were not finite, or far above those before it."""

    step: int
    incident: Literal["nonfinite", "spike"]
    loss: float
    grad_norm: float
    z_loss: float
    """Robust z-score of the loss; NaN while the window is not full."""
    z_grad_norm: float
    action: Literal["log", "skip", "stop", "rewind"]

    def event(self) -> dict[str, Any]:
        """What `metrics.jsonl` holds of it."""
        return asdict(self)

    def reason(self) -> dict[str, Any]:
        """Its numbers, for the record of a rewind; None where they are not finite."""
        numbers = {"loss": self.loss, "grad_norm": self.grad_norm}
        return {"reason": self.incident} | {
            k: v if math.isfinite(v) else None for k, v in numbers.items()
        }

    def __str__(self) -> str:
        numbers = f"loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}"
        if self.incident == "spike":
            numbers += f", {max(self.z_loss, self.z_grad_norm):.1f} deviations above the median"
        kind = "is not finite" if self.incident == "nonfinite" else "spikes"
        done = {
            "log": "",
            "skip": ": not taken",
            "stop": ": not taken",
            "rewind": ": not taken, going back",
        }
        return f"{self.step:>9,}  {kind} ({numbers}){done[self.action]}"


def robust_z(values: Tensor, history: Tensor) -> Tensor:
    """Distance of each value above the median of its history in robust standard deviations.

    Args:
        values: shape (n,).
        history: shape (n, window); NaN where there is none yet.

    Returns:
        Shape (n,); NaN for a history with a NaN.
    """
    median = history.median(dim=1).values
    deviation = (history - median[:, None]).abs().median(dim=1).values
    return (values - median) / torch.maximum(_SCALE * deviation, _FLOOR * median.abs())


class SpikeDetector:
    """Looks at each step's loss and gradient norm, holds steps back, and remembers what the host must know."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        """Begin with an empty history.

        Args:
            config: `spikes` and `train.on_nonfinite`.
            device: of the numbers.
        """
        self._spikes, self._on_nonfinite = config.spikes, config.train.on_nonfinite
        self.history = torch.full((2, config.spikes.window), math.nan, device=device)
        """The last losses and gradient norms, a ring: shape (2, window)."""
        self._halted = torch.zeros((), dtype=torch.bool, device=device)
        self._pending: list[tuple[int, Tensor]] = []
        self._held_in_a_row = 0

    def judge(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether step `step` must not change the weights: a bool on the device, shape ().

        Args:
            step: counts from 1.
            loss: mean over the whole batch, shape ().
            norm: of the gradient before clipping, shape ().
        """
        values = torch.stack([loss.detach(), norm.detach()]).float()
        finite = values.isfinite()
        z = robust_z(values, self.history)
        nonfinite, spike = ~finite.all(), finite.all() & (z > self._spikes.threshold).any()
        slot = step % self.history.shape[1]
        # A value that is not finite would blind the median; the one it replaces stays a while longer.
        self.history[:, slot] = torch.where(finite, values, self.history[:, slot])
        if self._on_nonfinite != "skip":
            self._halted |= nonfinite
        if self._spikes.action == "rewind":
            self._halted |= spike
        hold = nonfinite | self._halted
        if self._spikes.action == "skip":
            hold = hold | spike
        seen = torch.stack([nonfinite, spike, hold]).float()
        self._pending.append((step, torch.cat([values, z, seen])))
        return hold

    def drain(self) -> list[SpikeEvent]:
        """What happened since the last call, in order, up to the first that stops or rewinds.

        Raises:
            RunFailed: no step was taken for too long.
        """
        if not self._pending:
            return []
        steps = [step for step, _ in self._pending]
        rows = torch.stack([row for _, row in self._pending]).tolist()
        self._pending.clear()
        incidents = []
        for step, (loss, norm, z_loss, z_norm, nonfinite, spike, hold) in zip(
            steps, rows, strict=True
        ):
            self._held_in_a_row = self._held_in_a_row + 1 if hold else 0
            action = self._on_nonfinite if nonfinite else self._spikes.action if spike else "ignore"
            if action == "ignore":
                continue
            kind: Literal["nonfinite", "spike"] = "nonfinite" if nonfinite else "spike"
            incidents.append(SpikeEvent(step, kind, loss, norm, z_loss, z_norm, action))
            if action in ("stop", "rewind"):
                return incidents
        if self._held_in_a_row >= MAX_HELD_IN_A_ROW:
            raise RunFailed(
                f"the last {self._held_in_a_row} steps up to {steps[-1]:,} were not taken: none had a finite loss "
                "and gradient norm without a spike",
                hint="go on from a saved state at a lower rate: --branch NAME --from STEP --set optimizer.lr=RATE",
            )
        return incidents

    def state(self) -> dict[str, Tensor]:
        """Everything from which it can go on, once it is drained."""
        return {"history": self.history, "held_in_a_row": torch.tensor(self._held_in_a_row)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave; a branch with another window begins a new history."""
        history = state.get("history")
        if history is not None and history.shape == self.history.shape:
            self.history.copy_(history)
            self._held_in_a_row = int(state["held_in_a_row"])
        else:
            self.history.fill_(math.nan)
            self._held_in_a_row = 0
        self._halted.zero_()
        self._pending.clear()
