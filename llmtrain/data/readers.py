"""Read the documents of .txt, .jsonl (also .gz and .zst), .parquet and Arrow files.

Files are divided into partitions that can be read independently, on any machine.

Why own readers: errors name the file and line, and one column is read in bounded memory.
"""

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from llmtrain.errors import UserError
from llmtrain.model.tokenizer import well_formed
from llmtrain.storage.urls import is_url, local_path, open_url, url_errors

PARTITION_BYTES = 1 << 26
"""Approximate size of a partition: seconds of tokenizing. Compressed files are not divided."""

T = TypeVar("T")

KINDS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

_FIELD_HINT = "name the field that contains the text: --text-field NAME"
_TEXT_HINT = "convert it to UTF-8 (iconv -f latin1 -t utf-8) or leave the file out"
_PARQUET_ROWS = 64
_READ_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class FileRange:
    """Bytes `start` to `end` of JSON lines, row groups of parquet, else a whole file.

    `documents` is None if the file's metadata does not contain their number.
    """

    path: str
    bytes: int
    start: int = 0
    end: int | None = None
    documents: int | None = None


Partition = tuple[FileRange, ...]
"""Consecutive file ranges of about `PARTITION_BYTES` together: the unit of work of an engine."""


def kind_of(path: str) -> str | None:
    """Return the suffix that determines how a file is read; None for an unknown kind."""
    name = path.lower()
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def partitions_of(paths: Iterable[str]) -> list[Partition]:
    """Divide files, in order, into partitions. The same files give the same partitions."""
    ranges = (each for path in paths for each in ranges_of(path))
    return list(map(tuple, group_by_size(ranges, lambda each: each.bytes, PARTITION_BYTES)))


def group_by_size(items: Iterable[T], size_of: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Yield consecutive items in groups that reach `limit` in total; the last may be smaller."""
    group: list[T] = []
    size = 0
    for item in items:
        group.append(item)
        size += size_of(item)
        if size >= limit:
            yield group
            group, size = [], 0
    if group:
        yield group


def ranges_of(path: str) -> list[FileRange]:
    """Divide a file if its kind allows it: JSON lines at bytes, parquet between row groups."""
    with read_errors(path), _open_input(path) as file:
        if kind_of(path) == ".parquet":
            return _parquet_ranges(path, file)
        size = file.seek(0, os.SEEK_END)
    if kind_of(path) != ".jsonl":
        return [FileRange(path, size)]
    starts = range(0, max(size, 1), PARTITION_BYTES)
    bounds = [(start, min(start + PARTITION_BYTES, size)) for start in starts]
    return [FileRange(path, end - start, start, end) for start, end in bounds]


def read_partition(partition: Partition, field: str) -> Iterator[bytes | memoryview]:
    """Yield the documents of a partition in order, as UTF-8.

    A text file is one document without its byte order mark. A lone surrogate in JSON becomes
    U+FFFD. Damaged files, invalid lines and missing fields raise a UserError.
    """
    for file_range in partition:
        with read_errors(file_range.path):
            yield from _READERS[kind_of(file_range.path) or ".arrow"](file_range, field)


def _open_input(path: str) -> AbstractContextManager[Any]:
    return open_url(path) if is_url(path) else Path(local_path(path)).open("rb")


def text_of(row: Any, field: str, location: Callable[[], str]) -> str:
    """Return the text in `field` of a document; raise a UserError if there is none."""
    if not isinstance(row, dict):
        raise UserError(f"{location()} is not a JSON object", hint=f'write {{"{field}": "…"}}')
    if field not in row:
        found = ", ".join(map(str, row)) or "none"
        raise UserError(f"{location()} has no field {field!r}; it has: {found}", hint=_FIELD_HINT)
    if not isinstance(row[field], str):
        found = json.dumps(row[field], default=str)[:40]
        raise UserError(f"{location()}: field {field!r} is {found}, not text", hint=_FIELD_HINT)
    return str(row[field])


def _read_text(file_range: FileRange, field: str) -> Iterator[bytes]:
    path = file_range.path
    with _open_input(path) as file:
        content = file.read().removeprefix(_BYTE_ORDER_MARK)
    if b"\0" in content:
        zero = f"zero byte at {content.index(0):,}"
        raise UserError(f"{path} is not a text file ({zero})", hint=_TEXT_HINT)
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}", hint=_TEXT_HINT) from None
    yield content


def _read_json_lines(file_range: FileRange, field: str) -> Iterator[bytes]:
    for number, line in enumerate(_lines(file_range), start=1):
        is_first = number == 1 and not file_range.start
        content = line.removeprefix(_BYTE_ORDER_MARK) if is_first else line
        if content.strip():
            yield _text_of_line(content, field, partial(_location, file_range, number))


def _lines(file_range: FileRange) -> Iterator[bytes]:
    """Yield the lines that start in the range; the last one may end beyond it."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(Path(file_range.path).suffix.lower())
    start, end = file_range.start, file_range.end
    with _open_input(file_range.path) as file:
        if compression:
            with pa.input_stream(file, compression=compression) as stream:
                yield from io.BufferedReader(stream, _READ_BYTES)
            return
        position = start
        if start:
            file.seek(start - 1)
            position += len(file.readline()) - 1
        while (end is None or position < end) and (line := file.readline()):
            position += len(line)
            yield line


def _location(file_range: FileRange, number: int) -> str:
    """Return the path and line number, counting the lines before the range."""
    with _open_input(file_range.path) as file:
        left = max(file_range.start - 1, 0)
        while left and (content := file.read(min(left, _READ_BYTES))):
            number += content.count(b"\n")
            left -= len(content)
    return f"{file_range.path}, line {number + (file_range.start > 0)}"


def _text_of_line(line: bytes, field: str, location: Callable[[], str]) -> bytes:
    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if sum(key == field for key, _ in pairs) > 1:
            raise ValueError(f"field {field!r} appears twice in an object")
        return dict(pairs)

    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=checked)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{location()} is not valid JSON: {error}",
            hint="each line must be one JSON object in UTF-8; fix or remove it",
        ) from None
    return well_formed(text_of(row, field, location)).encode()


def _parquet_ranges(path: str, file: Any) -> list[FileRange]:
    """Group consecutive row groups into ranges of about `PARTITION_BYTES`."""
    with pq.ParquetFile(file) as parquet:
        row_groups = [(i, parquet.metadata.row_group(i)) for i in range(parquet.num_row_groups)]
    return [
        FileRange(
            path,
            bytes=sum(row_group.total_byte_size for _, row_group in group),
            start=group[0][0],
            end=group[-1][0] + 1,
            documents=sum(row_group.num_rows for _, row_group in group),
        )
        for group in group_by_size(
            row_groups, lambda each: each[1].total_byte_size, PARTITION_BYTES
        )
    ]


def _read_parquet(file_range: FileRange, field: str) -> Iterator[bytes]:
    path, start = file_range.path, file_range.start
    with _open_input(path) as file, pq.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        text_of(dict.fromkeys(names, ""), field, lambda: path)
        if names.count(field) > 1:
            problem = f"{path} has {names.count(field)} columns named {field!r}"
            raise UserError(problem, hint="rename all but one of them")
        row = sum(parquet.metadata.row_group(i).num_rows for i in range(start))
        row_groups = range(start, file_range.end or parquet.num_row_groups)
        batches = parquet.iter_batches(_PARQUET_ROWS, list(row_groups), columns=[field])
        for text in (text for rows in batches for text in rows.column(0).to_pylist()):
            row += 1
            yield text_of({field: text}, field, partial("{}, row {:,}".format, path, row)).encode()


def _read_arrow(file_range: FileRange, field: str) -> Iterator[memoryview]:
    """Yield the documents of an Arrow stream, not memory-mapped: mapped pages count as memory."""
    with _open_input(file_range.path) as file, pa.ipc.open_stream(file) as stream:
        texts = (text for rows in stream for text in rows.column(field))
        for number, text in enumerate(texts, start=1):
            if not text.is_valid:
                text_of({field: None}, field, partial("document {:,}".format, number))
            yield memoryview(text.as_buffer())


_READERS: dict[str, Callable[[FileRange, str], Iterator[bytes | memoryview]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".jsonl.zst": _read_json_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


@contextmanager
def read_errors(path: str) -> Iterator[None]:
    """Convert a failure to open or parse a file into a UserError that names it."""
    try:
        with url_errors(path) if is_url(path) else nullcontext():
            yield
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise UserError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}",
            hint="check that it is complete, readable, unchanged and of the kind in its name",
        ) from error
