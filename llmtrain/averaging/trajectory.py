"""The check for checkpoints with weights of another step or run, from norms of the merge.

Why neighbors only: distances shrink with the learning rate, and public series do not record it. A
multiple of the usual distance raised false alarms in every decay. A wrong tensor, however, lies far
from both neighbors while these are near each other. That holds for any schedule and spacing.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from llmtrain.averaging.merge import Norms
from llmtrain.checkpoints.checkpoint import Checkpoint
from llmtrain.errors import printable

SMALL = 1024
"""Tensors with fewer elements move too irregularly to be checked one by one."""

APART = 1.7
"""An inner tensor is off if it is this many times as far away as its neighbors are apart."""

FAR, FAR_ALONE = 4.0, 10.0
"""Multiples of the usual distance beyond which several tensors, or a single one, are off."""

UNRELATED, RELATED = 0.1, 0.6
"""Two versions of a tensor are unrelated below the first cosine and related above the second."""

Floats = NDArray[np.float64]


def outliers(checkpoints: Sequence[Checkpoint], norms: Norms) -> dict[int, str]:
    """Return a message for each checkpoint that is off the trajectory, by its index.

    An inner checkpoint is off if it is far from both neighbors compared with the distance between
    them. The first and the last are off if they are far from their only neighbor, compared with
    the nearest other distances and with other tensors. They are also off if they are unrelated to
    their neighbor although the next two checkpoints are related.
    """
    last = len(checkpoints) - 1
    if last < 1:
        return {}
    names, pooled = _pool_small_tensors(checkpoints[-1], norms)
    found: dict[int, list[str]] = defaultdict(list)
    for row, column, ratio in _inner(pooled):
        found[row].append(f"{names[column]} ({ratio:.1f} times as far as its neighbors are apart)")
    steps = np.array([checkpoint.step for checkpoint in checkpoints])
    for end, order in ((0, 1), (last, -1)) if last > 1 else ((last, -1),):
        moves = pooled.distance[1:][::order]
        far, unrelated = _outer(steps[::order], pooled.norm[::order], moves)
        for name, ratio, is_unrelated in zip(names, far, unrelated, strict=True):
            if ratio or is_unrelated:
                reason = f"{ratio:.1f} times the usual distance" if ratio else "unrelated"
                found[end].append(f"{name} ({reason})")
    return {row: _message(checkpoints[row].step, found[row]) for row in sorted(found)}


def _message(step: int, tensors: Sequence[str]) -> str:
    more = f" and {len(tensors) - 3} more tensors" if len(tensors) > 3 else ""
    shown = ", ".join(map(printable, tensors[:3])) + more
    return f"step {step:,} is off the trajectory: {shown}"


def _pool_small_tensors(newest: Checkpoint, norms: Norms) -> tuple[list[str], Norms]:
    """Return names and norms by tensor, with those below `SMALL` elements as one tensor."""
    small = np.array([newest.tensors[name].count < SMALL for name in norms.names], bool)

    def pool(values: Floats) -> Floats:
        return np.column_stack([values[:, ~small], values[:, small].sum(axis=1)])

    names = [name for name, is_small in zip(norms.names, small, strict=True) if not is_small]
    names.append(f"{small.sum()} small tensors")
    norm, distance = np.sqrt(pool(norms.norm**2)), np.sqrt(pool(norms.distance**2))
    return names, Norms(tuple(names), norm, distance, pool(norms.turn))


def _inner(norms: Norms) -> Iterator[tuple[int, int, float]]:
    """Yield row, column and distance ratio of each inner tensor far from both neighbors."""
    before, after = norms.distance[1:-1], norms.distance[2:]
    near = np.minimum(before, after)
    apart = np.sqrt(np.maximum(before**2 + after**2 + 2 * norms.turn[2:], 0))
    for row, column in np.argwhere(near > APART * apart):
        ratio = near[row, column] / max(apart[row, column], 1e-3 * near[row, column])
        yield int(row) + 1, int(column), float(ratio)


def _outer(
    steps: NDArray[np.int64], norm: Floats, moves: Floats
) -> tuple[Floats, NDArray[np.bool_]]:
    """Compare the first row with the next ones, by tensor.

    Return its ratio to the usual distance, or 0 if it is not far, and whether it is unrelated.

    A tensor that did not move later has no usual distance. Weights of the first steps are unrelated
    to those of more than twice the step.
    """
    spacing = np.abs(np.diff(steps))[:4, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        product = norm[:-1] ** 2 + norm[1:] ** 2 - moves**2
        cosine = np.nan_to_num(product / (2 * norm[:-1] * norm[1:]))
    unrelated = (cosine[0] < UNRELATED) & (moves[0] > 0) & (spacing[0] <= steps[:2].min())
    if len(moves) == 1:
        return np.zeros(len(unrelated)), unrelated
    usual = (moves[1:4] * np.maximum(spacing[0] / spacing[1:], 1)).max(axis=0)
    ratio = np.divide(moves[0], usual, out=np.zeros_like(usual), where=usual > 0)
    # A decay or warm-up changes the distances of all tensors alike, and a wrong shard does not.
    common = np.clip(np.quantile(ratio[ratio > 0], 0.25), 1, FAR) if ratio.any() else 1.0
    limit = FAR if (ratio > FAR * common).sum() > 1 else FAR_ALONE
    return np.where(ratio > limit * common, ratio, 0.0), unrelated & (cosine[1] > RELATED)
