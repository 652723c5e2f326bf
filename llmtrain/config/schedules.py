"""The learning rate and the block size as pure functions of the step.

Why pure: a resumed run, a plot and a plan must all see the rate that training saw, from the
configuration alone. No state, no torch.

    learning_rate(1000, config.schedule, peak=6e-3, max_steps=70_000)
"""

import math
from collections.abc import Callable

from llmtrain.config.data import DataConfig
from llmtrain.config.schema import (
    ConstantSchedule,
    CosineSchedule,
    CyclicSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    RunConfig,
    ScheduleConfig,
    SpamConfig,
    WsdSchedule,
)

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "1-sqrt": lambda x: 1.0 - math.sqrt(x),
}
"""Share of the peak that is left after the fraction x of a decay; 1 at x = 0, 0 at x = 1.

1-sqrt: Hägele et al. 2024 (arXiv 2405.18392). cosine: Loshchilov and Hutter 2017 (arXiv 1608.03983).
"""


def learning_rate(step: int, schedule: ScheduleConfig, peak: float, max_steps: int) -> float:
    """Learning rate of the update that makes step `step` out of step `step - 1`.

    Steps count from 1. Warm-up is linear and ends at exactly `peak` in step `warmup_steps`.

    Args:
        step: 1 for the first update.
        schedule: the shape.
        peak: the largest rate.
        max_steps: the end of the decay where the schedule names no horizon.
    """
    assert step >= 1, f"steps count from 1, not {step}"
    warmup = schedule.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    match schedule:
        case ConstantSchedule():
            return peak
        case CosineSchedule():
            return _decay(
                step, warmup, schedule.horizon or max_steps, "cosine", peak, schedule.min_lr
            )
        case LinearSchedule():
            return _decay(
                step, warmup, schedule.horizon or max_steps, "linear", peak, schedule.min_lr
            )
        case WsdSchedule():
            end = schedule.horizon or max_steps
            return _decay(
                step, end - schedule.decay_steps, end, schedule.shape, peak, schedule.min_lr
            )
        case InverseSqrtSchedule():
            return max(peak * math.sqrt(max(warmup, 1) / step), schedule.min_lr)
        case CyclicSchedule():
            cycle = schedule.cycle_steps
            share = ((step - warmup - 1) % cycle) / max(cycle - 1, 1)
            return schedule.min_lr + (peak - schedule.min_lr) * SHAPES["linear"](share)


def _decay(step: int, start: int, end: int, shape: str, peak: float, floor: float) -> float:
    """`peak` up to step `start`, then down the shape to `floor` at step `end` and after it."""
    share = min(max((step - start) / (end - start), 0.0), 1.0)
    return floor + (peak - floor) * SHAPES[shape](share)


def reset_factor(step: int, spam: SpamConfig) -> float:
    """Share of the learning rate in step `step` (from 1): SPAM's half a cosine after each reset.

    Source: Huang et al. 2025 (arXiv 2501.06842). The beginning of training is the schedule's own.
    """
    since = (step - 1) % spam.reset_every
    if step <= spam.reset_every or since >= spam.reset_warmup:
        return 1.0
    return 0.5 * (1.0 - math.cos(math.pi * (since + 1) / spam.reset_warmup))


def block_size(step: int, data: DataConfig) -> int:
    """Tokens of context in step `step` (from 1): `data.block_size`, less while it warms up.

    Source: the truncating schedule of Li et al. 2021 (arXiv 2108.06084), from `start` in a straight
    line to the whole at `block_warmup.steps`.
    """
    assert step >= 1, f"steps count from 1, not {step}"
    warmup = data.block_warmup
    if warmup is None or step >= warmup.steps:
        return data.block_size
    grown = warmup.start + (data.block_size - warmup.start) * (step - 1) // (warmup.steps - 1)
    return max(grown // warmup.multiple_of * warmup.multiple_of, warmup.start)


def tokens_until(step: int, config: RunConfig) -> int:
    """Tokens trained on after `step` steps."""
    warmup = config.data.block_warmup
    short = min(step, warmup.steps) if warmup is not None else 0
    lengths = sum(block_size(each, config.data) for each in range(1, short + 1))
    return config.batch_size * (lengths + (step - short) * config.data.block_size)
