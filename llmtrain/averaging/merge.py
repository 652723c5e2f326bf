"""The streaming merge: weighted sums of checkpoints, a piece of a tensor at a time, each input read once.

Why: a whole model never needs to be in memory, however many inputs and outputs there are. A piece is
read from every input in the order of the steps, added in float64 to each average that contains it,
and written, rounded once, when the last of its inputs has been added.

    norms = merge(checkpoints, [WeightedSum((0, 1, 2), (1 / 3, 1 / 3, 1 / 3))], [write])
"""

import itertools
import math
import os
import resource
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmtrain.averaging.turns import OrderedAccess, in_threads
from llmtrain.checkpoints.checkpoint import Checkpoint
from llmtrain.checkpoints.tensors import (
    FLOATS,
    Float64s,
    StoredArray,
    TensorSpec,
    overflows,
    round_to,
    to_float64,
)
from llmtrain.errors import UserError

CHUNK = 131_072
"""Numbers summed at a time: a thread's float64 buffers stay in the cache, and threads seldom wait for each other."""

_RUN = 8192
"""Numbers of which one dot product is computed."""

Integers = Literal["equal", "last"]
"""What is done with tensors of integers and booleans."""

Write = Callable[[str, int, StoredArray], None]
"""Takes a tensor's name, the index of the first number, and numbers in their stored form."""


@dataclass(frozen=True)
class WeightedSum:
    """One average: which inputs, and how much of each."""

    inputs: tuple[int, ...]
    """Indices into the sequence of checkpoints, ascending."""
    weights: tuple[float, ...]
    """One for each input; the average is Σ w_i θ_i."""
    decays: tuple[float, ...] | None = None
    """Instead of the sum: m ← d_i·m + (1 - d_i)·θ_i in float32, as an online average computes it."""

    divisor: float = 1.0
    """By which the sum is divided at its end."""

    def exact(self) -> tuple[dict[int, float], float]:
        """Factor of each input and the common divisor.

        Equal weights become 1 and k: sums of float32 numbers are then exact in float64 as long as
        their exponents differ by less than 29, so that no bit depends on the order.
        """
        if (
            self.decays is None
            and self.divisor == 1.0
            and len(set(self.weights)) == 1
            and math.isclose(self.weights[0] * len(self.weights), 1.0)
        ):
            return dict.fromkeys(self.inputs, 1.0), float(len(self.inputs))
        return dict(zip(self.inputs, self.weights, strict=True)), self.divisor


@dataclass(frozen=True)
class Norms:
    """What the pass saw of the trajectory, in float64; rows are inputs, columns tensors."""

    names: tuple[str, ...]
    """The float tensors."""
    norm: NDArray[np.float64]
    """L2 norm of each tensor of each input."""
    distance: NDArray[np.float64]
    """L2 norm of its difference from the input before; row 0 is 0."""


@dataclass(frozen=True)
class _Piece:
    name: str
    spec: TensorSpec
    start: int
    stop: int
    number: int
    """In the order of all pieces."""


def chunks(tensors: dict[str, TensorSpec], size: int) -> Iterator[_Piece]:
    """All numbers of all tensors in runs of at most `size`."""
    number = itertools.count()
    for name, spec in tensors.items():
        for start in range(0, spec.count, size):
            yield _Piece(name, spec, start, min(start + size, spec.count), next(number))


def merge(
    checkpoints: Sequence[Checkpoint],
    mixtures: Sequence[WeightedSum],
    writes: Sequence[Write],
    *,
    dtypes: Mapping[str, str] | None = None,
    integers: Integers = "equal",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    hashes: dict[Path, str] | None = None,
) -> Norms:
    """Compute every mixture in one pass over the checkpoints.

    Args:
        checkpoints: in the order in which they are added, alike (`check_alike`).
        mixtures: the averages; float tensors are averaged, others must be equal in all inputs.
        writes: where the numbers of each mixture go, in the order of the newest input; called from
            several threads, each by one at a time.
        dtypes: dtype of each output tensor; default: that of the inputs.
        integers: tensors that have no mean must be equal in all inputs, or are the last input's.
        threads: default: the cores this process may use, at most 4.
        progress: called with the pieces done and in all.
        hashes: takes the SHA-256 of the input files that were read first to last: those of safetensors that
            hold their tensors in the order of the newest input.

    Raises:
        UserError: a NaN or infinite weight, integers that differ, an input cut short.
    """
    work = list(chunks(checkpoints[-1].tensors, CHUNK))
    todo = iter(work)  # shared by the threads: each takes the next piece when it is free
    stats = np.zeros((len(work), 2, len(checkpoints)))
    done = itertools.count(1)
    _allow_open_files()
    stopped = threading.Event()
    with ExitStack() as files:
        sources = [_Source(checkpoint, files, stopped) for checkpoint in checkpoints]
        if hashes is not None:
            for source in sources:
                source.start_hashing()
        targets = [_Target(write, stopped) for write in writes]

        def worker() -> None:
            summing = _Summing(sources, mixtures, targets, dtypes or {}, integers)
            for piece in todo:
                if stopped.is_set():
                    return
                stats[piece.number] = summing.piece(piece)
                if progress is not None:
                    progress(next(done), len(work))

        in_threads(worker, threads or min(_cores(), 4), stopped)
        if hashes is not None:
            for source in sources:
                hashes |= source.hashes()
    return _norms(work, stats)


def _cores() -> int:
    """Cores this process may use; not every system tells those from the cores there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _allow_open_files() -> None:
    """Many checkpoints of many shards are open at once: use what the system allows, not its default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _norms(work: Sequence[_Piece], stats: NDArray[np.float64]) -> Norms:
    """Add up the squares of the pieces in their order, so that the result does not depend on threads."""
    names = list(dict.fromkeys(piece.name for piece in work if piece.spec.dtype in FLOATS))
    column = {name: index for index, name in enumerate(names)}
    squares = np.zeros((2, stats.shape[2], len(names)))
    for piece, stat in zip(work, stats, strict=True):
        if piece.name in column:
            squares[:, :, column[piece.name]] += stat
    return Norms(tuple(names), *np.sqrt(squares))


class _Source:
    """An open input."""

    def __init__(self, checkpoint: Checkpoint, files: ExitStack, stopped: threading.Event) -> None:
        self.checkpoint = checkpoint
        self.tensors = checkpoint.tensors
        self._reader = files.enter_context(checkpoint.reader())
        self._turns = OrderedAccess(stopped)
        residual = checkpoint.residual
        self._residual = _Source(residual, files, stopped) if residual is not None else None

    def raw(self, piece: _Piece, buffer: NDArray[np.uint8]) -> StoredArray:
        """The piece in its stored form."""
        with self._turns.of(piece.number):
            return self._reader.read(piece.name, piece.start, piece.stop, buffer)

    def start_hashing(self) -> None:
        """See `Reader`."""
        self._reader.start_hashing()
        if self._residual is not None:
            self._residual.start_hashing()

    def hashes(self) -> dict[Path, str]:
        """See `Reader`."""
        return self._reader.hashes() | (
            self._residual.hashes() if self._residual is not None else {}
        )

    def floats(
        self, piece: _Piece, buffer: NDArray[np.uint8], out: Float64s, scratch: Float64s
    ) -> None:
        """The piece in float64, written to `out`."""
        to_float64(self.raw(piece, buffer), self.tensors[piece.name].dtype, out)
        if self._residual is not None:
            self._residual.floats(piece, buffer, scratch, scratch)
            out += scratch


class _Target:
    """Where one mixture goes."""

    def __init__(self, write: Write, stopped: threading.Event) -> None:
        self._write = write
        self._turns = OrderedAccess(stopped)

    def write(self, piece: _Piece, raw: StoredArray) -> None:
        """Hand over the piece in its stored form."""
        with self._turns.of(piece.number):
            self._write(piece.name, piece.start, raw)


class _Summing:
    """The buffers of one thread, and what it does with a piece."""

    def __init__(
        self,
        sources: Sequence[_Source],
        mixtures: Sequence[WeightedSum],
        targets: Sequence[_Target],
        dtypes: Mapping[str, str],
        integers: Integers,
    ) -> None:
        self._sources = sources
        self._integers_rule = integers
        self._mixtures = mixtures
        self._factors = [mixture.exact() for mixture in mixtures]
        self._place = [{i: place for place, i in enumerate(mixture.inputs)} for mixture in mixtures]
        self._targets = targets
        self._dtypes = dtypes
        self._users = [
            [m for m, mix in enumerate(mixtures) if i in mix.inputs] for i in range(len(sources))
        ]
        self._raw = np.empty(CHUNK * 8, np.uint8)
        self._values = [np.empty(CHUNK), np.empty(CHUNK)]
        self._scratch = np.empty(CHUNK)
        self._free: list[Float64s] = []

    def piece(self, piece: _Piece) -> NDArray[np.float64]:
        """Average one piece in every mixture; squares of norms and distances, shape (2, inputs)."""
        if piece.spec.dtype in FLOATS:
            return self._floats(piece)
        self._integers(piece)
        return np.zeros((2, len(self._sources)))

    def _floats(self, piece: _Piece) -> NDArray[np.float64]:
        count = piece.stop - piece.start
        squares = np.zeros((2, len(self._sources)))
        scratch = self._scratch[:count]
        sums: dict[int, Float64s] = {}
        for index, source in enumerate(self._sources):
            values, before = (self._values[(index + turn) % 2][:count] for turn in (0, 1))
            source.floats(piece, self._raw, values, scratch)
            squares[0, index] = _square(values)
            if not math.isfinite(squares[0, index]) and not np.isfinite(values).all():
                raise self._not_finite(source, piece, values)
            if index:
                np.subtract(values, before, out=scratch)
                squares[1, index] = _square(scratch)
            for mixture in self._users[index]:
                self._add(mixture, index, values, sums, scratch)
                if index == self._mixtures[mixture].inputs[-1]:
                    self._finish(mixture, piece, sums.pop(mixture))
        return squares

    def _add(
        self,
        number: int,
        index: int,
        values: Float64s,
        sums: dict[int, Float64s],
        scratch: Float64s,
    ) -> None:
        """Add input `index` to the sum of mixture `number`."""
        decays = self._mixtures[number].decays
        first = number not in sums
        if first:
            buffer = self._free.pop() if self._free else np.empty(CHUNK)
            sums[number] = buffer[: len(values)]
        if decays is not None:
            _decay_towards(
                sums[number], values, None if first else decays[self._place[number][index]]
            )
            return
        factor = self._factors[number][0][index]
        if first:
            np.multiply(values, factor, out=sums[number])
        elif factor == 1.0:
            sums[number] += values
        else:
            np.multiply(values, factor, out=scratch)
            sums[number] += scratch

    def _finish(self, number: int, piece: _Piece, total: Float64s) -> None:
        """Round the sum of mixture `number` and hand it over."""
        total /= self._factors[number][1]
        dtype = self._dtypes.get(piece.name, piece.spec.dtype)
        raw = round_to(total, dtype)
        if overflows(raw, dtype):
            raise UserError(
                f"the average of {piece.name} has numbers that {dtype} cannot hold",
                hint="a wider --dtype; with weights below 0 or above 1, look at --show-weights",
            )
        self._targets[number].write(piece, raw)
        self._free.append(total if total.base is None else total.base)

    def _integers(self, piece: _Piece) -> None:
        """Numbers that have no mean are copied from the newest input of each mixture."""
        held = [source.raw(piece, self._raw).copy() for source in self._sources]
        for mixture, target in zip(self._mixtures, self._targets, strict=True):
            first, *others = mixture.inputs
            for other in others:
                if self._integers_rule == "equal" and not np.array_equal(held[other], held[first]):
                    raise UserError(
                        f"{piece.name} ({piece.spec}) cannot be averaged and differs between "
                        f"step {self._sources[first].checkpoint.step:,} and "
                        f"step {self._sources[other].checkpoint.step:,}",
                        hint="--integers last takes it from the newest checkpoint",
                    )
            target.write(piece, held[mixture.inputs[-1]])

    def _not_finite(self, source: _Source, piece: _Piece, values: Float64s) -> UserError:
        position = piece.start + int(np.flatnonzero(~np.isfinite(values))[0])
        index = tuple(int(i) for i in np.unravel_index(position, piece.spec.shape or (1,)))
        return UserError(
            f"{source.checkpoint.location}: {piece.name} holds {values[position - piece.start]} at {list(index)}",
            hint=f"step {source.checkpoint.step:,} is broken: choose a window without it",
        )


def _decay_towards(mean: Float64s, values: Float64s, decay: float | None) -> None:
    """One update of an online EMA, to the bit: three float32 roundings (`averaging/online.py`).

    `mean` holds float32 numbers; decay None is the first update, which copies.
    """
    fresh = values.astype(np.float32)
    if decay is not None:
        before = mean.astype(np.float32)
        before *= np.float32(decay)
        fresh *= np.float32(1.0 - decay)
        fresh += before
    mean[...] = fresh


def _square(values: Float64s) -> float:
    """Sum of squares, in runs: the dot product of a longer one would start threads of its own."""
    runs, rest = np.split(values, [len(values) - len(values) % _RUN])
    runs = runs.reshape(-1, _RUN)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for what is not finite
        return float(np.matmul(runs[:, None, :], runs[:, :, None]).sum() + np.dot(rest, rest))
