"""The streaming merge: weighted sums of checkpoints, a piece of a tensor at a time, each input read once.

Why: a whole model never needs to be in memory, however many inputs and outputs there are. A piece is
read from every input in the order of the steps, added in float64 to each average that contains it,
and written, rounded once, when the last of its inputs has been added.

    norms = merge(checkpoints, [Mixture((0, 1, 2), (1 / 3, 1 / 3, 1 / 3))], [write])

Inputs are read by position (pread) and not through a memory map: a map's pages count as memory of
this process until the kernel takes them back, and a file that is cut short meanwhile would kill it.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmtrain.averaging.header import FLOATS, ITEM_BYTES, TensorSpec
from llmtrain.averaging.numbers import RAW, Float64s, Raw, narrow, overflows, widen
from llmtrain.averaging.series import Checkpoint
from llmtrain.errors import UserError

PIECE = 65_536
"""Numbers summed at a time: the float64 buffers of one thread stay in a core's cache."""

Write = Callable[[str, int, Raw], None]
"""Takes a tensor's name, the index of the first number, and numbers in their stored form."""


@dataclass(frozen=True)
class Mixture:
    """One average: which inputs, and how much of each."""

    inputs: tuple[int, ...]
    """Indices into the sequence of checkpoints, ascending."""
    weights: tuple[float, ...]
    """One for each input; the average is Σ w_i θ_i."""

    def exact(self) -> tuple[dict[int, float], float]:
        """Factor of each input and a common divisor.

        Equal weights become 1 and k: sums of float32 numbers are then exact in float64 as long as
        their exponents differ by less than 29, so that no bit depends on the order.
        """
        if len(set(self.weights)) == 1 and math.isclose(self.weights[0] * len(self.weights), 1.0):
            return dict.fromkeys(self.inputs, 1.0), float(len(self.inputs))
        return dict(zip(self.inputs, self.weights, strict=True)), 1.0


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


def pieces(tensors: dict[str, TensorSpec], size: int) -> Iterator[_Piece]:
    """All numbers of all tensors in runs of at most `size`."""
    for name, spec in tensors.items():
        for start in range(0, spec.count, size):
            yield _Piece(name, spec, start, min(start + size, spec.count))


def merge(
    checkpoints: Sequence[Checkpoint],
    mixtures: Sequence[Mixture],
    writes: Sequence[Write],
    *,
    dtypes: dict[str, str] | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Norms:
    """Compute every mixture in one pass over the checkpoints.

    Args:
        checkpoints: ascending by step, alike (`check_alike`).
        mixtures: the averages; float tensors are averaged, others must be equal in all inputs.
        writes: where the numbers of each mixture go; called from several threads.
        dtypes: dtype of each output tensor; default: that of the inputs.
        threads: default: the cores this process may use, at most 4.
        progress: called with the pieces done and in all.

    Raises:
        UserError: a NaN or infinite weight, integers that differ, an input cut short.
    """
    tensors = checkpoints[-1].tensors
    work = list(pieces(tensors, PIECE))
    todo = iter(enumerate(work))  # a list's iterator may be shared by threads
    stats = np.zeros((len(work), 2, len(checkpoints)))
    done = 0
    with ExitStack() as stack:
        readers = [stack.enter_context(Reader(checkpoint)) for checkpoint in checkpoints]
        failed = threading.Event()

        def worker() -> None:
            nonlocal done
            summing = _Summing(readers, mixtures, writes, dtypes or {})
            try:
                for index, piece in todo:
                    if failed.is_set():
                        return
                    stats[index] = summing.piece(piece)
                    done += 1
                    if progress is not None:
                        progress(done, len(work))
            except BaseException:
                failed.set()
                raise

        count = threads or min(len(os.sched_getaffinity(0)), 4)
        with ThreadPoolExecutor(count) as pool:
            try:
                for future in [pool.submit(worker) for _ in range(count)]:
                    future.result()
            finally:
                failed.set()
    return _norms(work, stats)


def _norms(work: Sequence[_Piece], stats: NDArray[np.float64]) -> Norms:
    """Add up the squares of the pieces in their order, so that the result does not depend on threads."""
    names = list(dict.fromkeys(piece.name for piece in work if piece.spec.dtype in FLOATS))
    column = {name: index for index, name in enumerate(names)}
    squares = np.zeros((2, stats.shape[2], len(names)))
    for piece, stat in zip(work, stats, strict=True):
        if piece.name in column:
            squares[:, :, column[piece.name]] += stat
    return Norms(tuple(names), *np.sqrt(squares))


class Reader:
    """The open files of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> "Reader":
        for path in self.checkpoint.shards:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def read(self, name: str, start: int, stop: int, buffer: NDArray[np.uint8]) -> Raw:
        """Numbers `start` to `stop` of a tensor in their stored form; they lie in `buffer`.

        Raises:
            UserError: the file ends before them.
        """
        path, tensor = self.checkpoint.places[name]
        width = ITEM_BYTES[tensor.dtype]
        target = buffer[: (stop - start) * width]
        got = 0
        while got < len(target):
            count = os.preadv(
                self._descriptors[path], [target[got:].data], tensor.start + start * width + got
            )
            if count == 0:
                raise UserError(f"{path} was cut short while it was read", hint="restore the file")
            got += count
        raw: Raw = target.view(RAW[tensor.dtype])
        return raw


class _Summing:
    """The buffers of one thread, and what it does with a piece."""

    def __init__(
        self,
        readers: Sequence[Reader],
        mixtures: Sequence[Mixture],
        writes: Sequence[Write],
        dtypes: dict[str, str],
    ) -> None:
        self._readers = readers
        self._mixtures = mixtures
        self._factors = [mixture.exact() for mixture in mixtures]
        self._writes = writes
        self._dtypes = dtypes
        self._users = [[m for m, mix in enumerate(mixtures) if i in mix.inputs] for i in range(len(readers))]
        self._raw = np.empty(PIECE * 8, np.uint8)
        self._values = [np.empty(PIECE), np.empty(PIECE)]
        self._scratch = np.empty(PIECE)
        self._free: list[Float64s] = []

    def piece(self, piece: _Piece) -> NDArray[np.float64]:
        """Average one piece in every mixture; squares of norms and distances, shape (2, inputs)."""
        if piece.spec.dtype in FLOATS:
            return self._floats(piece)
        self._integers(piece)
        return np.zeros((2, len(self._readers)))

    def _floats(self, piece: _Piece) -> NDArray[np.float64]:
        count = piece.stop - piece.start
        squares = np.zeros((2, len(self._readers)))
        scratch = self._scratch[:count]
        sums: dict[int, Float64s] = {}
        for index, reader in enumerate(self._readers):
            values, before = (self._values[(index + turn) % 2][:count] for turn in (0, 1))
            widen(reader.read(piece.name, piece.start, piece.stop, self._raw), piece.spec.dtype, values)
            squares[0, index] = _square(values)
            if not math.isfinite(squares[0, index]) and not np.isfinite(values).all():
                raise self._not_finite(reader, piece, values)
            if index:
                np.subtract(values, before, out=scratch)
                squares[1, index] = _square(scratch)
            for mixture in self._users[index]:
                self._add(mixture, index, values, sums, scratch)
                if index == self._mixtures[mixture].inputs[-1]:
                    self._finish(mixture, piece, sums.pop(mixture))
        return squares

    def _add(
        self, mixture: int, index: int, values: Float64s, sums: dict[int, Float64s], scratch: Float64s
    ) -> None:
        factor = self._factors[mixture][0][index]
        if mixture not in sums:
            buffer = self._free.pop() if self._free else np.empty(PIECE)
            sums[mixture] = buffer[: len(values)]
            np.multiply(values, factor, out=sums[mixture])
        elif factor == 1.0:
            sums[mixture] += values
        else:
            np.multiply(values, factor, out=scratch)
            sums[mixture] += scratch

    def _finish(self, mixture: int, piece: _Piece, total: Float64s) -> None:
        total /= self._factors[mixture][1]
        dtype = self._dtypes.get(piece.name, piece.spec.dtype)
        raw = narrow(total, dtype)
        if dtype != piece.spec.dtype and overflows(raw, dtype):
            raise UserError(
                f"the average of {piece.name} has numbers that {dtype} cannot hold",
                hint="choose another --dtype",
            )
        self._writes[mixture](piece.name, piece.start, raw)
        self._free.append(total.base if isinstance(total.base, np.ndarray) else total)

    def _integers(self, piece: _Piece) -> None:
        """Numbers that have no mean: equal in all inputs, and copied."""
        first = self._readers[0].read(piece.name, piece.start, piece.stop, self._raw).copy()
        for reader in self._readers[1:]:
            if not np.array_equal(reader.read(piece.name, piece.start, piece.stop, self._raw), first):
                raise UserError(
                    f"{piece.name} ({piece.spec}) cannot be averaged and differs between "
                    f"step {self._readers[0].checkpoint.step:,} and step {reader.checkpoint.step:,}",
                    hint="--integers last takes it from the newest checkpoint",
                )
        for write in self._writes:
            write(piece.name, piece.start, first)

    def _not_finite(self, reader: Reader, piece: _Piece, values: Float64s) -> UserError:
        position = piece.start + int(np.flatnonzero(~np.isfinite(values))[0])
        index = tuple(int(i) for i in np.unravel_index(position, piece.spec.shape or (1,)))
        return UserError(
            f"{reader.checkpoint.path}: {piece.name} holds {values[position - piece.start]} at {list(index)}",
            hint=f"step {reader.checkpoint.step:,} is broken: choose a window without it",
        )


def _square(values: Float64s) -> float:
    """Sum of squares; einsum and not dot, which would start threads of its own."""
    return float(np.einsum("i,i->", values, values))
