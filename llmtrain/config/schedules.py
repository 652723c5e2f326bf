"""Learning rate and block size as pure functions of the step."""

import math
from collections.abc import Callable

from llmtrain.config import sections
from llmtrain.config.schema import RunConfig, SpamConfig

DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "1-sqrt": lambda x: 1.0 - math.sqrt(x),
}
"""Remaining share of the peak after the fraction x of a decay: 1 at x = 0, 0 at x = 1.

1-sqrt: Hägele et al. 2024 (arXiv 2405.18392). cosine: Loshchilov, Hutter 2017 (arXiv 1608.03983).
"""


def learning_rate(
    step: int, schedule: sections.ScheduleConfig, peak: float, max_steps: int
) -> float:
    """Return the learning rate of update `step` (from 1)."""
    assert step >= 1, f"steps count from 1, not {step}"
    warmup = schedule.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    match schedule:
        case sections.ConstantSchedule():
            return peak
        case sections.InverseSqrtSchedule():
            return max(peak * math.sqrt(max(warmup, 1) / step), schedule.min_lr)
        case sections.CyclicSchedule():
            cycle = schedule.cycle_steps
            start, end, shape = 0, max(cycle - 1, 1), "linear"
            step = (step - warmup - 1) % cycle
        case sections.WsdSchedule():
            end = schedule.horizon or max_steps
            start, shape = end - schedule.decay_steps, schedule.shape
        case sections.CosineSchedule():
            start, end, shape = warmup, schedule.horizon or max_steps, schedule.name
    share = min(max((step - start) / (end - start), 0.0), 1.0)
    return schedule.min_lr + (peak - schedule.min_lr) * DECAY_SHAPES[shape](share)


def reset_factor(step: int, spam: SpamConfig) -> float:
    """Return SPAM's factor of the learning rate in step `step` (from 1): a cosine after each reset.

    Source: Huang et al. 2025 (arXiv 2501.06842). The start of training has its own warm-up.
    """
    since = (step - 1) % spam.reset_every
    if step <= spam.reset_every or since >= spam.reset_warmup:
        return 1.0
    return 0.5 * (1.0 - math.cos(math.pi * (since + 1) / spam.reset_warmup))


def block_size(step: int, data: sections.DataConfig) -> int:
    """Return the context length in tokens of step `step` (from 1).

    Source: the truncating schedule of Li et al. 2021 (arXiv 2108.06084), linear from
    `block_warmup.start` to `data.block_size` at `block_warmup.steps`.
    """
    assert step >= 1, f"steps count from 1, not {step}"
    warmup = data.block_warmup
    if warmup is None or step >= warmup.steps:
        return data.block_size
    grown = warmup.start + (data.block_size - warmup.start) * (step - 1) // (warmup.steps - 1)
    return max(grown // warmup.multiple_of * warmup.multiple_of, warmup.start)


def tokens_until(step: int, config: RunConfig) -> int:
    """Return the number of training tokens in the first `step` steps."""
    warmup = config.data.block_warmup
    short = min(step, warmup.steps) if warmup is not None else 0
    lengths = sum(block_size(each, config.data) for each in range(1, short + 1))
    return config.batch_size * (lengths + (step - short) * config.data.block_size)
