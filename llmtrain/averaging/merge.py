"""The streaming merge: weighted sums of checkpoints, one chunk of a tensor at a time.

A chunk is read from every input in order of the steps, added in float64 to each sum that contains
the input, and written, rounded once, after its last input. Each input is read once for all sums.
Memory does not depend on the size of the model or the number of inputs.
"""

import itertools
import math
import resource
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmtrain.averaging.request import Integers
from llmtrain.checkpoints.checkpoint import Checkpoint, verified_reader
from llmtrain.checkpoints.tensors import (
    FLOATS,
    Float64s,
    StoredArray,
    TensorSpec,
    exact_floats,
    overflows,
    round_to,
)
from llmtrain.errors import UserError
from llmtrain.runtime.hardware import available_cores

CHUNK = 262_144
"""Elements summed at a time: buffers fit in the cache, and Python takes little of the time."""

_DOT_ELEMENTS = 2048
"""Elements per dot product: few enough for accurate float32 sums without BLAS threads."""

_ACCURATE = (1e-25, 1e30)
"""Range in which sums of float32 squares neither overflow nor lose small terms."""

_COUNTER = "num_batches_tracked"
"""BatchNorm's count of batches, which grows during training; the newest value is kept."""

Write = Callable[[str, int, StoredArray], None]
"""Takes a tensor's name, the index of the first element, and elements in stored form."""


@dataclass(frozen=True)
class WeightedSum:
    """One average as a sum Σ w_i θ_i over some of the inputs."""

    inputs: tuple[int, ...]
    """Indices into the sequence of checkpoints, ascending."""
    weights: tuple[float, ...]
    """One for each input."""
    divisor: float = 1.0
    """Divides the finished sum."""

    def factors(self) -> tuple[dict[int, float], float]:
        """Return the factor of each input and the divisor.

        Equal weights become 1 and k: float64 sums of float32 numbers are then exact if their
        exponents differ by less than 29, so the result does not depend on the order.
        """
        if (
            self.divisor == 1.0
            and len(set(self.weights)) == 1
            and math.isclose(self.weights[0] * len(self.weights), 1.0)
        ):
            return dict.fromkeys(self.inputs, 1.0), float(len(self.inputs))
        return dict(zip(self.inputs, self.weights, strict=True)), self.divisor


@dataclass(frozen=True)
class Norms:
    """L2 norms of the float tensors of the inputs; rows are inputs, columns tensors."""

    names: tuple[str, ...]
    norm: NDArray[np.float64]
    distance: NDArray[np.float64]
    """Norm of the difference from the previous input; 0 in row 0 and if it is not measured."""
    turn: NDArray[np.float64]
    """Dot product of that difference and the previous input's; rows 0 and 1 are 0."""


@dataclass(frozen=True)
class Chunk:
    """A range of elements of one tensor."""

    name: str
    spec: TensorSpec
    start: int
    stop: int
    number: int
    """Position among all chunks."""


def chunks(tensors: dict[str, TensorSpec]) -> Iterator[Chunk]:
    """Split all tensors into chunks of at most `CHUNK` elements."""
    number = itertools.count()
    for name, spec in tensors.items():
        for start in range(0, spec.count, CHUNK):
            yield Chunk(name, spec, start, min(start + CHUNK, spec.count), next(number))


def merge(
    checkpoints: Sequence[Checkpoint],
    sums: Sequence[WeightedSum],
    writes: Sequence[Write],
    *,
    dtypes: Mapping[str, str] | None = None,
    integers: Integers = "equal",
    progress: Callable[[int, int], None] | None = None,
    verify: bool = True,
    distances: bool = True,
) -> Norms:
    """Compute every sum in one pass over the checkpoints.

    Args:
        checkpoints: in the order of addition, alike (`require_same_tensors`).
        writes: one for each sum; called in stored order, from several threads but one at a time.
        dtypes: dtype of each output tensor; default: that of the inputs.
        integers: `equal`: integer tensors must agree in all inputs; `last`: copy the newest one's.
        progress: called with the chunks done and the total.
        verify: compare the inputs with their recorded digests while reading them.
        distances: measure the distances and turns, which takes a fifth of the time.

    Raises:
        UserError: a NaN or infinite weight, integers that differ, or a damaged input.
    """
    work = list(chunks(checkpoints[-1].tensors))
    todo = iter(work)  # shared: each thread takes the next chunk when it is free
    squares = np.zeros((len(work), 3, len(checkpoints)))
    done = itertools.count(1)
    _raise_file_limit()
    stopped = threading.Event()
    with ExitStack() as files:
        readers = [_OrderedReader(each, files, stopped, verify=verify) for each in checkpoints]
        outputs = [(write, OrderedAccess(stopped)) for write in writes]

        def worker() -> None:
            summation = _Summation(readers, sums, outputs, dtypes or {}, integers, distances)
            for chunk in todo:
                if stopped.is_set():
                    return
                squares[chunk.number] = summation.add(chunk)
                if progress is not None:
                    progress(next(done), len(work))

        _run_threads(worker, min(available_cores(), 4), stopped)
    return _norms(work, squares)


def _norms(work: Sequence[Chunk], squares: NDArray[np.float64]) -> Norms:
    """Add the squares in chunk order, so that threads do not change the result."""
    names = list(dict.fromkeys(chunk.name for chunk in work if chunk.spec.dtype in FLOATS))
    column = {name: index for index, name in enumerate(names)}
    total = np.zeros((3, squares.shape[2], len(names)))
    for chunk, square in zip(work, squares, strict=True):
        if chunk.name in column:
            total[:, :, column[chunk.name]] += square
    norm, distance = np.sqrt(total[:2])
    return Norms(tuple(names), norm, distance, total[2])


class _Stopped(Exception):
    """Another thread failed, so the awaited chunk never arrives."""


class OrderedAccess:
    """Admits threads to a file one at a time, in order of the chunks.

    Why not one queue per file: threads would hand over every chunk and block for it. Here a thread
    processes a whole chunk, and blocks only if the previous chunk is at the same file.
    """

    def __init__(self, stopped: threading.Event) -> None:
        self._stopped = stopped
        self._next = 0
        self._changed = threading.Condition()

    @contextmanager
    def at(self, number: int) -> Iterator[None]:
        """Block until all chunks before `number` have passed."""
        with self._changed:
            while self._next != number:
                if self._stopped.is_set():
                    raise _Stopped
                self._changed.wait(0.1)
        yield
        with self._changed:
            self._next = number + 1
            self._changed.notify_all()


class _OrderedReader:
    """An open input that returns chunks in order."""

    def __init__(
        self, checkpoint: Checkpoint, files: ExitStack, stopped: threading.Event, *, verify: bool
    ) -> None:
        self.checkpoint = checkpoint
        self.stored = files.enter_context(
            verified_reader(checkpoint) if verify else checkpoint.reader()
        )
        self._tensors = checkpoint.tensors
        self._access = OrderedAccess(stopped)
        residual = checkpoint.residual
        self.parts = [self]
        """This file, then its residual."""
        if residual is not None:
            self.parts.append(_OrderedReader(residual, files, stopped, verify=verify))

    def read(self, chunk: Chunk, buffer: NDArray[np.uint8]) -> StoredArray:
        """Read a chunk in stored form."""
        with self._access.at(chunk.number):
            return self.stored.read(chunk.name, chunk.start, chunk.stop, buffer)

    def read_floats(self, chunk: Chunk, buffer: "_Buffer") -> StoredArray:
        """Read a chunk as exact float32 or float64; with a residual, as their float64 sum."""
        raw = self.read(chunk, buffer.raw)
        floats = exact_floats(raw, self._tensors[chunk.name].dtype, buffer.floats)
        for residual in self.parts[1:]:
            total = floats.astype(np.float64)
            floats = np.add(total, residual.read_floats(chunk, buffer), out=total)
        return floats


class _Buffer:
    """Memory for one chunk of one input: as stored, as floats, and minus the previous input."""

    def __init__(self) -> None:
        self.raw, self.floats, self.move = np.empty((3, CHUNK * 8), np.uint8)


@dataclass
class _Summation:
    """The sums of one thread, with its buffers."""

    readers: Sequence[_OrderedReader]
    sums: Sequence[WeightedSum]
    outputs: Sequence[tuple[Write, OrderedAccess]]
    dtypes: Mapping[str, str]
    integers: Integers
    distances: bool

    def __post_init__(self) -> None:
        self._factors = [each.factors() for each in self.sums]
        self._users = [
            [number for number, each in enumerate(self.sums) if index in each.inputs]
            for index in range(len(self.readers))
        ]
        self._buffers = [_Buffer(), _Buffer()]
        self._scratch = np.empty(CHUNK)
        self._free: list[Float64s] = []

    @np.errstate(over="ignore", invalid="ignore")  # non-finite numbers are reported below
    def add(self, chunk: Chunk) -> NDArray[np.float64]:
        """Sum one chunk; return its squared norms, squared distances and turns: (3, inputs)."""
        squares = np.zeros((3, len(self.readers)))
        if chunk.spec.dtype not in FLOATS:
            self._copy_integers(chunk)
            return squares
        totals: dict[int, Float64s] = {}
        values: StoredArray | None = None
        move: StoredArray | None = None
        for index, reader in enumerate(self.readers):
            buffer, previous, before = self._buffers[index % 2], values, move
            values = reader.read_floats(chunk, buffer)
            squares[0, index], _ = _square(values, None, buffer.move)
            if not math.isfinite(squares[0, index]) and not np.isfinite(values).all():
                raise _not_finite(reader.checkpoint, chunk, values)
            if previous is not None and self.distances:
                squares[1, index], move = _square(values, previous, buffer.move)
                squares[2, index] = 0.0 if before is None else _dot(move, before)
            for number in self._users[index]:
                self._accumulate(totals, number, index, values)
                if index == self.sums[number].inputs[-1]:
                    total = totals.pop(number)
                    self._finish(number, chunk, total[: len(values)])
                    self._free.append(total)
        return squares

    def _accumulate(
        self, totals: dict[int, Float64s], number: int, index: int, values: StoredArray
    ) -> None:
        """Add the values of an input, times its factor, to the total of sum `number`."""
        factor, count = self._factors[number][0][index], len(values)
        if index == self.sums[number].inputs[0]:
            totals[number] = self._free.pop() if self._free else np.empty(CHUNK)
            totals[number][:count] = values
            if factor != 1.0:
                totals[number][:count] *= factor
        elif factor == 1.0:
            totals[number][:count] += values
        else:
            scratch = self._scratch[:count]
            totals[number][:count] += np.multiply(values, factor, out=scratch, dtype=np.float64)

    def _finish(self, number: int, chunk: Chunk, total: Float64s) -> None:
        """Round the total of sum `number` and write it."""
        if (divisor := self._factors[number][1]) != 1.0:
            total /= divisor
        dtype = self.dtypes.get(chunk.name, chunk.spec.dtype)
        raw = round_to(total, dtype)
        if overflows(raw, dtype):
            raise UserError(
                f"the average of {chunk.name} has numbers that {dtype} cannot represent",
                hint="use a wider --dtype; check weights below 0 or above 1 with --show-weights",
            )
        self._write(number, chunk, raw)

    def _write(self, number: int, chunk: Chunk, raw: StoredArray) -> None:
        write, access = self.outputs[number]
        with access.at(chunk.number):
            write(chunk.name, chunk.start, raw)

    def _copy_integers(self, chunk: Chunk) -> None:
        """Copy elements without a mean from the newest input of each sum."""
        buffer = self._buffers[0].raw
        held = [reader.read(chunk, buffer).copy() for reader in self.readers]
        is_counter = chunk.name.rpartition(".")[2] == _COUNTER
        must_agree = self.integers == "equal" and not is_counter
        for number, each in enumerate(self.sums):
            first, *others = each.inputs
            for other in others:
                if must_agree and not np.array_equal(held[other], held[first]):
                    steps = [self.readers[i].checkpoint.step for i in (first, other)]
                    raise UserError(
                        f"{chunk.name} ({chunk.spec}) cannot be averaged and differs between "
                        f"step {steps[0]:,} and step {steps[1]:,}",
                        hint="add --checks allow-integers to copy it from the newest checkpoint",
                    )
            self._write(number, chunk, held[each.inputs[-1]])


def _not_finite(checkpoint: Checkpoint, chunk: Chunk, values: StoredArray) -> UserError:
    offset = int(np.flatnonzero(~np.isfinite(values))[0])
    index = np.unravel_index(chunk.start + offset, chunk.spec.shape or (1,))
    return UserError(
        f"{checkpoint.location}: {chunk.name} contains {values[offset]} at {[*map(int, index)]}",
        hint=f"choose a window without step {checkpoint.step:,}, which is broken",
    )


def _square(
    values: StoredArray, previous: StoredArray | None, buffer: NDArray[np.uint8]
) -> tuple[float, StoredArray]:
    """Return the sum of squares of `values - previous`, and this difference, possibly in `buffer`.

    It is computed in float32 if the numbers are float32 and this is accurate, else in float64.
    """
    move = values
    if previous is not None:
        out = buffer.view(np.result_type(values, previous))[: len(values)]
        move = np.subtract(values, previous, out=out)
    total = _dot(move, move)
    if move.dtype == np.float32 and not _ACCURATE[0] < total < _ACCURATE[1]:
        wide = values.astype(np.float64)
        move = wide if previous is None else wide - previous
        total = _dot(move, move)
    return total, move


def _dot(one: StoredArray, other: StoredArray) -> float:
    """Return the dot product, computed in blocks that are added in float64."""
    whole = len(one) // _DOT_ELEMENTS * _DOT_ELEMENTS
    rows, columns = (each[:whole].reshape(-1, _DOT_ELEMENTS) for each in (one, other))
    product = np.matmul(rows[:, None, :], columns[:, :, None]).sum(dtype=np.float64)
    return float(product + np.dot(one[whole:], other[whole:]))


def _run_threads(worker: Callable[[], None], count: int, stopped: threading.Event) -> None:
    """Run `worker` in `count` threads; stop all and raise if one fails or a signal arrives."""
    with ThreadPoolExecutor(count) as pool:
        try:
            for future in as_completed([pool.submit(worker) for _ in range(count)]):
                with suppress(_Stopped):  # the thread that failed finishes first
                    future.result()
        finally:
            stopped.set()


def _raise_file_limit() -> None:
    """Allow as many open files as the system permits: sharded inputs need many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
