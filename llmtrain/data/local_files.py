"""Documents from files on this machine: .txt, .jsonl (also .gz and .zst) and .parquet.

Why readers of our own in front of `datasets`: an error names the file and the line, what is read is
one column in bounded memory, and no codec beyond pyarrow's is needed.

    for text in read_documents([Path("books"), Path("web.jsonl.zst")], "text"): ...
"""

import glob
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmtrain.data.tokenizer import well_formed
from llmtrain.errors import UserError

_PARQUET_ROWS = 64
_READ_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


# --- which files -------------------------------------------------------------------------------


def find_files(source: str) -> tuple[list[Path], list[Path]]:
    """The files that a path, a folder or a glob means, in order, and those of a folder that are skipped.

    A folder is walked and sorted by path; hidden files are left out, and files of another kind are
    the second list. A file that is named, or matched by a glob, must be of a known kind.

    Raises:
        UserError: nothing is there, or a file's kind is not known.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
        known = [p for p in found if _reader_of(p)]
        if not known:
            raise UserError(
                f"{source} holds no file of a known kind ({_kinds()})",
                hint="name a folder with text in one of these kinds",
            )
        return known, [p for p in found if not _reader_of(p)]
    if path.is_file():
        paths = [path]
    else:
        # Path.glob knows no absolute pattern.
        matches = (Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207  (takes absolute patterns)
        paths = sorted(match for match in matches if match.is_file())
    if not paths:
        raise UserError(
            f"{source} matches no file" if glob.has_magic(source) else f"{source}: no such file or folder",
            hint="SOURCE is a file, a folder, a glob in quotes, openwebtext, hub:NAME[:CONFIG] or sotu",
        )
    for each in paths:
        if not _reader_of(each):
            raise UserError(f"{each} is of an unknown kind", hint=f"known are {_kinds()}")
    return paths, []


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


# --- reading -----------------------------------------------------------------------------------


def read_documents(paths: list[Path], field: str, limit: int | None = None) -> Iterator[str]:
    """The documents of all files in order, at most `limit`; each is valid in UTF-8.

    A text file is one document, byte for byte (a byte order mark is dropped, line ends are kept). A
    lone surrogate, which JSON can spell, becomes U+FFFD.

    Raises:
        UserError: a file is damaged or no text, a line is not JSON, or `field` is missing or no text.
    """
    count = 0
    for path in paths:
        reader = _reader_of(path)
        assert reader is not None
        with _damage_named(path):
            for text in reader(path, field):
                if limit is not None and count >= limit:
                    return
                yield text
                count += 1


def _read_text(path: Path, field: str) -> Iterator[str]:
    content = path.read_bytes().removeprefix(_BYTE_ORDER_MARK)
    if b"\0" in content:
        raise _not_text(f"{path} is no text file (zero byte at {content.index(0):,})")
    try:
        yield content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_text(f"{path} is not UTF-8 text (byte {error.start:,})") from None


def _read_json_lines(path: Path, field: str) -> Iterator[str]:
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.input_stream(str(path), compression=compression) as stream:
        for number, line in enumerate(io.BufferedReader(stream, _READ_BYTES), start=1):
            content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            if content.strip():
                yield _text_of_line(content, f"{path}, line {number}", field)


def _text_of_line(line: bytes, where: str, field: str) -> str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise _not_text(f"{where} is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not valid JSON: {error}", hint="each line must be one JSON object; fix or remove it"
        ) from None
    if not isinstance(row, dict):
        raise UserError(
            f"{where} is a JSON {_json_type(row)}, not an object", hint=f'each line is {{"{field}": "…"}}'
        )
    if field not in row:
        raise missing_field(where, field, list(row))
    text = row[field]
    if not isinstance(text, str):
        raise not_a_string(where, field, _json_type(text))
    return well_formed(text)


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if field not in names:
            raise missing_field(str(path), field, names)
        kind = file.schema_arrow.field(field).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise not_a_string(str(path), field, str(kind))
        row = 0
        for rows in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
            for text in rows.column(0).to_pylist():
                row += 1
                if text is None:
                    raise not_a_string(f"{path}, row {row:,}", field, "null")
                yield text


# --- kinds -------------------------------------------------------------------------------------

_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".jsonl.zst": _read_json_lines,
    ".parquet": _read_parquet,
}


def _reader_of(path: Path) -> Callable[[Path, str], Iterator[str]] | None:
    name = path.name.lower()
    return next((reader for suffix, reader in _READERS.items() if name.endswith(suffix)), None)


def _kinds() -> str:
    return ", ".join(_READERS)


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
        message, hint="only UTF-8 text is read; convert it (iconv -f latin1 -t utf-8) or leave the file out"
    )


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise UserError(
            f"{path} cannot be read: {reason}", hint="is it complete, and really of the kind its name says?"
        ) from error
