"""Documents from spans of files: .txt, .jsonl (also .gz and .zst), .parquet and Arrow streams.

Why spans: a part of a file that can be read by itself can be read by anyone, at any time: by a thread
here, by a task elsewhere, or by the command that goes on after a kill. Why readers of our own: an
error names the file and the line, and what is read is one column in bounded memory.

    for span in spans_of("web.jsonl"): texts = list(read_span(span, "text"))
"""

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmtrain.errors import UserError
from llmtrain.model.tokenizer import well_formed
from llmtrain.storage.urls import is_url, local_path, open_url, url_errors

PARTITION_BYTES = 1 << 26
"""A unit of work is about so much input: seconds of tokenizing. Compressed files are not cut."""

KINDS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

_PARQUET_ROWS = 64
_READ_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Span:
    """What is read in one go: bytes `start` to `end` of JSON lines, row groups of parquet, else a whole file.

    Attributes:
        bytes: its size in the file.
        documents: how many it holds, where the file says so without being read.
    """

    path: str
    bytes: int
    start: int = 0
    end: int | None = None
    documents: int | None = None


Partition = tuple[Span, ...]
"""Consecutive spans of about `PARTITION_BYTES` together: the unit of work of an engine."""


def kind_of(path: str) -> str | None:
    """The suffix that says how a file is read; None for a file of no known kind."""
    name = path.lower()
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def spans_of(path: str) -> list[Span]:
    """A file, cut where it can be: JSON lines at bytes, parquet between row groups.

    Raises:
        UserError: the file cannot be read.
    """
    with damage_named(path), open_input(path) as file:
        if kind_of(path) == ".parquet":
            return _parquet_spans(path, file)
        size = file.seek(0, os.SEEK_END)
    if kind_of(path) != ".jsonl":
        return [Span(path, size)]
    starts = range(0, max(size, 1), PARTITION_BYTES)
    ends = [min(start + PARTITION_BYTES, size) for start in starts]
    return [Span(path, end - start, start, end) for start, end in zip(starts, ends, strict=True)]


def partitions_of(spans: Iterable[Span]) -> list[Partition]:
    """Spans in order, put together until they are worth a task; the same spans give the same partitions."""
    partitions: list[Partition] = []
    group: list[Span] = []
    size = 0
    for span in spans:
        group.append(span)
        size += span.bytes
        if size >= PARTITION_BYTES:
            partitions.append(tuple(group))
            group, size = [], 0
    return [*partitions, tuple(group)] if group else partitions


def read_partition(partition: Partition, field: str) -> Iterator[bytes | memoryview]:
    """The documents of its spans in order, as UTF-8.

    A text file is one document, byte for byte (a byte order mark is dropped, line ends are kept). A
    lone surrogate, which JSON can spell, becomes U+FFFD.

    Raises:
        UserError: a file is damaged or no text, a line is not JSON, or `field` is missing or no text.
    """
    for span in partition:
        with damage_named(span.path):
            yield from _READERS[kind_of(span.path) or ".arrow"](span, field)


@contextmanager
def open_input(path: str) -> Iterator[Any]:
    """A file to read bytes from, with `seek`: a path or a URL."""
    if is_url(path):
        with open_url(path) as file:
            yield file
        return
    with Path(local_path(path)).open("rb") as file:
        yield file


# --- one reader a kind -------------------------------------------------------------------------


def _read_text(span: Span, field: str) -> Iterator[bytes]:
    with open_input(span.path) as file:
        content = file.read().removeprefix(_BYTE_ORDER_MARK)
    if b"\0" in content:
        raise _not_text(f"{span.path} is no text file (zero byte at {content.index(0):,})")
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_text(f"{span.path} is not UTF-8 text (byte {error.start:,})") from None
    yield content


def _read_json_lines(span: Span, field: str) -> Iterator[bytes]:
    for number, line in enumerate(_lines(span), start=1):
        content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 and not span.start else line
        if content.strip():
            yield _text_of_line(content, partial(_place, span, number), field)


def _lines(span: Span) -> Iterator[bytes]:
    """The lines whose first byte is in the span; the last one may end beyond it."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(Path(span.path).suffix.lower())
    with open_input(span.path) as file:
        if compression:
            with pa.input_stream(file, compression=compression) as stream:
                yield from io.BufferedReader(stream, _READ_BYTES)
            return
        position = span.start
        if span.start:
            file.seek(span.start - 1)
            position += len(file.readline()) - 1
        while (span.end is None or position < span.end) and (line := file.readline()):
            position += len(line)
            yield line


def _place(span: Span, number: int) -> str:
    """Where a line is in the file; what lies before the span is read to say so."""
    with open_input(span.path) as file:
        left = max(span.start - 1, 0)
        while left and (content := file.read(min(left, _READ_BYTES))):
            number += content.count(b"\n")
            left -= len(content)
    return f"{span.path}, line {number + (span.start > 0)}"


def _text_of_line(line: bytes, where: Callable[[], str], field: str) -> bytes:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise _not_text(f"{where()} is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where()} is not valid JSON: {error}",
            hint="each line must be one JSON object; fix or remove it",
        ) from None
    if not isinstance(row, dict):
        raise UserError(
            f"{where()} is a JSON {_json_type(row)}, not an object",
            hint=f'each line is {{"{field}": "…"}}',
        )
    if field not in row:
        raise missing_field(where(), field, list(row))
    text = row[field]
    if not isinstance(text, str):
        raise not_a_string(where(), field, _json_type(text))
    return well_formed(text).encode()


def _parquet_spans(path: str, file: Any) -> list[Span]:
    """Row groups, put together until they are worth a task."""
    with pq.ParquetFile(file) as parquet:
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
    spans: list[Span] = []
    start = size = rows = 0
    for number, group in enumerate(groups, start=1):
        size += group.total_byte_size
        rows += group.num_rows
        if size >= PARTITION_BYTES or number == len(groups):
            spans.append(Span(path, size, start, number, rows))
            start, size, rows = number, 0, 0
    return spans


def _read_parquet(span: Span, field: str) -> Iterator[bytes]:
    with open_input(span.path) as file, pq.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        if field not in names:
            raise missing_field(span.path, field, names)
        kind = parquet.schema_arrow.field(field).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (
            pa.types.is_string(kind)
            or pa.types.is_large_string(kind)
            or pa.types.is_string_view(kind)
        ):
            raise not_a_string(span.path, field, str(kind))
        row = sum(parquet.metadata.row_group(i).num_rows for i in range(span.start))
        groups = list(range(span.start, parquet.num_row_groups if span.end is None else span.end))
        for rows in parquet.iter_batches(
            batch_size=_PARQUET_ROWS, columns=[field], row_groups=groups
        ):
            for text in rows.column(0).to_pylist():
                row += 1
                if text is None:
                    raise not_a_string(f"{span.path}, row {row:,}", field, "null")
                yield text.encode()


def _read_arrow(span: Span, field: str) -> Iterator[memoryview]:
    """Read as a stream and not memory-mapped: mapped pages count as memory, which would grow with the corpus."""
    number = 0
    with open_input(span.path) as file, pa.ipc.open_stream(file) as stream:
        for rows in stream:
            for text in rows.column(field):
                number += 1
                if not text.is_valid:
                    raise not_a_string(f"document {number:,}", field, "null")
                yield memoryview(text.as_buffer())


_READERS: dict[str, Callable[[Span, str], Iterator[bytes | memoryview]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".jsonl.zst": _read_json_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


# --- errors ------------------------------------------------------------------------------------


def missing_field(where: str, field: str, present: list[str]) -> UserError:
    """The error for a document without `field`; names the fields that there are."""
    return UserError(
        f"{where} has no field {field!r}; it has: {', '.join(map(str, present)) or 'none'}",
        hint="name the field that holds the text: --text-field NAME",
    )


def not_a_string(where: str, field: str, kind: str) -> UserError:
    """The error for a field that holds something other than text."""
    return UserError(
        f"{where}: field {field!r} is {kind}, not text",
        hint="name the field that holds the text: --text-field NAME",
    )


def _not_text(message: str) -> UserError:
    return UserError(
        message,
        hint="only UTF-8 text is read; convert it (iconv -f latin1 -t utf-8) or leave the file out",
    )


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


@contextmanager
def damage_named(path: str) -> Iterator[None]:
    """A failure to read becomes an error that names the file.

    Raises:
        UserError: the file cannot be opened or read, or is not of its kind.
    """
    try:
        with url_errors(path) if is_url(path) else nullcontext():
            yield
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        reason = (
            os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        )
        hint = "is it complete, and really of the kind its name says?"
        if isinstance(error, (PermissionError, FileNotFoundError)):
            hint = "it must be there, and readable by you, until the last shard is written"
        raise UserError(f"{path} cannot be read: {reason}", hint=hint) from error
