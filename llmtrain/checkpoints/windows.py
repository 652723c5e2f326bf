"""Which checkpoints make a window: steps s, s - N, …, s - (k-1)N, all of them present.

Why apart: the rule is arithmetic on step numbers, the same for a run, a folder or a hub series, and
what cannot be had must be answered with what can.

    sliding_windows([20, 40, 60, 80], every=20, size=3)  # [(20, 40, 60), (40, 60, 80)]
"""

from collections.abc import Sequence

Window = tuple[int, ...]
"""Steps, ascending; the last one is the step the average stands for."""


def sliding_windows(steps: Sequence[int], *, every: int, size: int) -> list[Window]:
    """Each complete window of `size` steps `every` apart, by its last step (Kaddour's LAWA).

    Args:
        steps: what there is, ascending.
        every: distance between two checkpoints of a window, in training steps.
        size: checkpoints in a window.
    """
    present = set(steps)
    candidates = (tuple(range(last - (size - 1) * every, last + 1, every)) for last in steps)
    return [window for window in candidates if present.issuperset(window)]


def disjoint_windows(steps: Sequence[int], *, every: int, size: int) -> list[Window]:
    """Complete windows that share no checkpoint, from the oldest on (Sanyal et al.'s script).

    Two neighbours are at least `every` apart, so that they continue one grid where there is one.
    """
    chosen: list[Window] = []
    for window in sliding_windows(steps, every=every, size=size):
        if not chosen or window[0] >= chosen[-1][-1] + every:
            chosen.append(window)
    return chosen


def possible_spacings(steps: Sequence[int], size: int) -> list[int]:
    """Every N, ascending, for which `steps` hold at least one complete window of `size`."""
    if size == 1 or len(steps) < size:
        return []
    longest = (steps[-1] - steps[0]) // (size - 1)
    distances = {b - a for i, a in enumerate(steps) for b in steps[i + 1 :] if b - a <= longest}
    return sorted(every for every in distances if sliding_windows(steps, every=every, size=size))


def describe_steps(steps: Sequence[int]) -> str:
    """Steps as a person would say them: `20 to 900 every 20, 950`."""
    parts = []
    start = 0
    while start < len(steps):
        end = start + 1
        while (
            end + 1 < len(steps) and steps[end + 1] - steps[end] == steps[start + 1] - steps[start]
        ):
            end += 1
        if end - start >= 2:
            every = steps[start + 1] - steps[start]
            parts.append(f"{steps[start]:,} to {steps[end]:,} every {every:,}")
            start = end + 1
        else:
            parts.append(f"{steps[start]:,}")
            start += 1
    if len(parts) > 12:
        parts[6:-6] = ["…"]
    return ", ".join(parts) or "none"


def describe_spacings(spacings: Sequence[int]) -> str:
    """A few of the possible spacings: `20, 40, 60, … 220`."""
    if len(spacings) <= 6:
        return ", ".join(map(str, spacings))
    return f"{', '.join(map(str, spacings[:4]))}, … {spacings[-1]}"
