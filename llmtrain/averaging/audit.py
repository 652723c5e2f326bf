"""Are the checkpoints what they claim to be: known-bad revisions, duplicates, and breaks in the trajectory.

Why: public series do serve the wrong weights at some steps, and an average of wrong weights loads and
runs as well as a right one. What is checked comes nearly free: hashes that are recorded anyway, and
norms from the pass that sums.

    refuse_duplicates({1000: {"model.safetensors": "ab…"}, 2000: {"model.safetensors": "ab…"}})
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.resources import files

import numpy as np

from llmtrain.averaging.merge import CHUNK, Norms, chunks
from llmtrain.checkpoints.checkpoint import Checkpoint
from llmtrain.checkpoints.windows import describe_steps
from llmtrain.errors import UserError

LARGE = 4096
"""Numbers from which on a tensor that is equal at two steps cannot be so by chance."""

FAR = 5.0
"""How many times the usual distance from its neighbours makes a checkpoint's tensor an outlier."""

UNRELATED = 1.2
"""Distance as a share of the norm beyond which a large tensor is no continuation (√2: independent weights)."""

_SHOWN = 12


def known_bad(repository: str | None, steps: Sequence[int]) -> dict[int, str]:
    """Steps of a hub series that are known to hold wrong weights, with what is wrong and who says so."""
    data = json.loads((files("llmtrain.averaging") / "known_bad.json").read_text())
    bad: dict[int, str] = {}
    # The hub's names do not depend on case.
    named = {name.lower(): entries for name, entries in data.items()}
    for entry in named.get((repository or "").lower(), []):
        for item in entry["steps"]:
            which = range(item[0], item[1] + 1, item[2]) if isinstance(item, list) else [item]
            bad |= {step: f"{entry['what']} ({entry['issue']})" for step in which if step in steps}
    return bad


def refuse_known_bad(repository: str | None, steps: Sequence[int]) -> None:
    """Raise a UserError when a step is known to hold wrong weights."""
    if bad := known_bad(repository, steps):
        lines = "\n  ".join(f"step {step:,} {what}" for step, what in sorted(bad.items())[:_SHOWN])
        raise UserError(
            f"{repository} has revisions that are known to be wrong:\n  {lines}",
            hint="choose a window without them, or --allow-known-bad",
        )


def refuse_duplicates(
    hashes: Mapping[int, Mapping[str, str]], final: tuple[int, Mapping[str, str]] | None = None
) -> None:
    """Raise a UserError when a file has the same content at two steps.

    Args:
        hashes: step → file name → SHA-256.
        final: the last step and the files of the finished model; to hold one of its files at
            another step is a duplicate too.
    """
    where: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for step, held in hashes.items():
        for name, digest in held.items():
            where[digest].append((step, name))
    found = []
    finals = {} if final is None else {digest: name for name, digest in final[1].items()}
    for digest, holders in where.items():
        steps = sorted({step for step, _ in holders})
        if len(steps) > 1:
            found.append(
                f"{holders[0][1]} is the same at steps {describe_steps(steps)} (SHA-256 {digest[:16]}…)"
            )
        if final is not None and digest in finals and steps != [final[0]]:
            found.append(
                f"{holders[0][1]} at {describe_steps([s for s in steps if s != final[0]])} "
                f"is {finals[digest]} of the finished model (SHA-256 {digest[:16]}…)"
            )
    _refuse(found)


def refuse_duplicate_tensors(checkpoints: Sequence[Checkpoint], norms: Norms) -> None:
    """Raise a UserError when a large tensor is the same, bit for bit, at two steps.

    Equal norms (in float64, of all its numbers) point out candidates, which are then compared.
    Tensors of one repeated number, such as biases of zero, do not count.
    """
    specs = checkpoints[-1].tensors
    found = []
    for column, name in enumerate(norms.names):
        if specs[name].count < LARGE:
            continue
        rows: dict[float, list[int]] = defaultdict(list)
        for row, norm in enumerate(norms.norm[:, column]):
            rows[float(norm)].append(row)
        for candidates in rows.values():
            if len({checkpoints[row].step for row in candidates}) > 1:
                same = [
                    c
                    for c in candidates
                    if _equal(checkpoints[candidates[0]], checkpoints[c], name)
                ]
                steps = sorted({checkpoints[row].step for row in same})
                # The same in all of three or more is a frozen tensor or a buffer, such as a mask.
                frozen = len(same) == len(checkpoints) > 2
                if len(steps) > 1 and not frozen:
                    found.append(f"{name} is the same at steps {describe_steps(steps)}")
    _refuse(found)


def _refuse(found: Sequence[str]) -> None:
    if found:
        more = f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise UserError(
            "the same content stands at different steps:\n  " + "\n  ".join(found[:_SHOWN]) + more,
            hint="one of them is not what it claims: choose a window without it, or --allow-duplicates",
        )


def _equal(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    """Whether a tensor has the same bits in both, and not all its numbers are the same."""
    first, constant = None, True
    buffers = np.empty(CHUNK * 8, np.uint8), np.empty(CHUNK * 8, np.uint8)
    with ExitStack() as stack:
        readers = [stack.enter_context(checkpoint.reader()) for checkpoint in (one, other)]
        for piece in chunks({name: one.tensors[name]}, CHUNK):
            a, b = (
                reader.read(name, piece.start, piece.stop, buffer)
                for reader, buffer in zip(readers, buffers, strict=True)
            )
            if not np.array_equal(a.view(np.uint8), b.view(np.uint8)):
                return False
            first = a[0].copy() if first is None else first
            constant = constant and bool((a == first).all())
    return not constant


def outliers(checkpoints: Sequence[Checkpoint], norms: Norms) -> list[str]:
    """Checkpoints that are off the trajectory, tensor by tensor: one line for each, naming the step.

    An inner checkpoint is off when even the nearer of its neighbours is `FAR` times as far as
    checkpoints otherwise are (the median distance); an outer one when its only neighbour is `FAR`
    times the largest other distance. Any is off when a large tensor moves by more than `UNRELATED`
    times its norm, whatever the others do.
    """
    specs = checkpoints[-1].tensors
    found: dict[int, list[str]] = defaultdict(list)
    for column, name in enumerate(norms.names):
        steps = norms.distance[1:, column]
        scale = np.minimum(norms.norm[1:, column], norms.norm[:-1, column])
        unrelated = (
            steps > UNRELATED * scale if specs[name].count >= LARGE else np.zeros(len(steps), bool)
        )
        for row in range(len(checkpoints)):
            beside = [i for i in (row - 1, row) if 0 <= i < len(steps)]
            others = np.delete(steps, beside)
            if not beside or not len(others):
                usual = 0.0
            else:
                usual = float(np.median(others) if len(beside) == 2 else others.max())
            nearest = float(steps[beside].min()) if beside else 0.0
            if (usual > 0.0 and nearest > FAR * usual) or (
                len(beside) == 2 and unrelated[beside].all()
            ):
                far = usual > 0.0 and nearest > FAR * usual
                times = f"{nearest / usual:.1f} times the usual distance" if far else "unrelated"
                found[row].append(f"{name} ({times})")
        if len(steps) == 1 and unrelated[0]:
            found[1].append(f"{name} (unrelated)")
    lines = []
    for row, names in sorted(found.items()):
        more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
        lines.append(
            f"step {checkpoints[row].step:,} is off the trajectory: {', '.join(names[:3])}{more}"
        )
    return lines
