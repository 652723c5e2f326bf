"""Windows of checkpoints, as arithmetic on step numbers: s - (k-1)N, …, s - N, s, all present."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

Window = tuple[int, ...]
"""Steps, ascending; the last one is the step of the average."""

_SHOWN_SPACINGS = 6
_SEARCHED_STEPS = 1000
"""Number of newest steps in which to search for spacings, which takes quadratic time."""


def sliding_windows(steps: Sequence[int], *, every: int, size: int) -> list[Window]:
    """Return each complete window of `size` steps, `every` apart (Kaddour's LAWA).

    `steps` and the windows are in ascending order.
    """
    if size > len(steps):
        return []
    present = set(steps)
    lasts = [last for last in steps if last - (size - 1) * every >= steps[0]]
    candidates = (tuple(range(last - (size - 1) * every, last + 1, every)) for last in lasts)
    return [window for window in candidates if present.issuperset(window)]


def disjoint_windows(steps: Sequence[int], *, every: int, size: int) -> list[Window]:
    """Return complete windows that share no checkpoint, oldest first (Sanyal et al.'s script).

    Consecutive windows are at least `every` apart, so windows of a regular grid stay on it.
    """
    chosen: list[Window] = []
    for window in sliding_windows(steps, every=every, size=size):
        if not chosen or window[0] >= chosen[-1][-1] + every:
            chosen.append(window)
    return chosen


def possible_spacings(steps: Sequence[int], size: int) -> list[int]:
    """Return the smallest spacings, ascending, that give a complete window of `size` steps."""
    if size == 1 or len(steps) < size:
        return []
    return list(islice(_spacings(steps[-_SEARCHED_STEPS:], size), _SHOWN_SPACINGS + 1))


def _spacings(steps: Sequence[int], size: int) -> Iterator[int]:
    pairs = Counter(b - a for i, a in enumerate(steps) for b in steps[i + 1 :])
    for every in sorted(pairs):
        if pairs[every] >= size - 1 and sliding_windows(steps, every=every, size=size):
            yield every


def describe_steps(steps: Sequence[int]) -> str:
    """Format steps as ranges: `20 to 900 every 20, 950`."""
    parts, rest = [], list(steps)
    while rest:
        every = rest[1] - rest[0] if len(rest) > 1 else 0
        count = next((i for i, step in enumerate(rest) if step != rest[0] + i * every), len(rest))
        if count > 2:
            parts.append(f"{rest[0]:,} to {rest[count - 1]:,} every {every:,}")
        else:
            parts.append(f"{rest[0]:,}")
        rest = rest[count if count > 2 else 1 :]
    if len(parts) > 12:
        parts[6:-6] = ["…"]
    return ", ".join(parts) or "none"


def describe_spacings(spacings: Sequence[int]) -> str:
    """Format the first spacings: `20, 40, 60, 80, 100, 120, …`."""
    more = ["…"] if len(spacings) > _SHOWN_SPACINGS else []
    return ", ".join([*map(str, spacings[:_SHOWN_SPACINGS]), *more])
