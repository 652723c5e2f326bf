"""Documents to token shards: split, tokenize in parallel, write in order, commit at the end.

Why one ordered stream: what is written then depends on the documents and the seed alone, and only
a few megabytes a worker are in memory. Everything is built in `.tmp-NAME` beside the target, which
gets its name when the last byte is on disk; so a data folder is whole or it is not there. What a
killed prepare leaves is deleted by the next one.

    manifest = prepare("openwebtext", Path("data/openwebtext"))
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import numpy.typing as npt

from llmtrain import files
from llmtrain.data.encode import Piece, encoded, pieces
from llmtrain.data.manifest import (
    MANIFEST_FILE,
    SPLITS,
    Manifest,
    Plan,
    SplitRecord,
    SplitRule,
    read_manifest,
    write_manifest,
)
from llmtrain.data.shards import open_data, tokenizer_record
from llmtrain.data.sources import OPENWEBTEXT_HUB, Documents, Source, open_source
from llmtrain.data.token_files import MAX_SHARD_TOKENS, ShardWriter
from llmtrain.data.tokenizer import PIECE_BYTES, load_tokenizer
from llmtrain.errors import RunFailed, UserError

DEFAULT_VAL_FRACTION = 0.0005
DEFAULT_SEED = 2357
DEFAULT_SHARD_TOKENS = 100_000_000

PUBLISHED_OPENWEBTEXT = {"train": 9_035_582_198, "val": 4_434_897}
"""Tokens that nanoGPT's preparation of OpenWebText gives, and this one with its defaults."""


@dataclass(frozen=True)
class Progress:
    """How far a preparation is.

    First documents are read (`total_documents` is not known yet), then tokenized and written;
    `tokens` and `text_bytes` are those written so far.
    """

    documents: int
    total_documents: int | None
    tokens: int
    text_bytes: int


def _ignore(_: object) -> None:
    return None


def prepare(
    source: str,
    out: Path,
    *,
    tokenizer: str = "gpt2",
    val_fraction: float = DEFAULT_VAL_FRACTION,
    seed: int = DEFAULT_SEED,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    workers: int | None = None,
    text_field: str = "text",
    limit_documents: int | None = None,
    on_progress: Callable[[Progress], None] = _ignore,
    on_note: Callable[[str], None] = _ignore,
) -> Manifest:
    """Write the tokens of `source` to the folder `out`; its manifest.

    Args:
        source: see `sources.open_source`.
        out: the data folder. When it holds this very data already, nothing is done.
        tokenizer: "gpt2" or "byte".
        val_fraction: share of documents for the val split, rounded up; 0 for an empty one.
        seed: of the split.
        shard_tokens: a shard ends with the document that brings it to so many tokens.
        workers: threads that tokenize (default: one a core). The output does not depend on it.
        text_field: the field or column that holds the text.
        limit_documents: take only so many documents, from the first.
        on_progress: called every few megabytes.
        on_note: called with sentences that a person should see.

    Raises:
        UserError: the source cannot be read, an option is out of range, or `out` holds other data.
        RunFailed: the disk is full or failed.
    """
    _check_options(val_fraction, seed, shard_tokens, workers, limit_documents)
    encoder = load_tokenizer(tokenizer)
    with _staging(out) as staging:
        opened = open_source(source, text_field, limit_documents, staging / "documents")
        plan = Plan(
            tokenizer=tokenizer_record(tokenizer),
            source=opened.record,
            split=SplitRule(val_fraction=val_fraction, seed=seed),
            shard_tokens=shard_tokens,
        )
        existing = _existing(out, plan)
        if existing is not None:
            on_note(f"{out} holds this data already: nothing to do")
            return existing
        documents = _load(opened, source, on_note, on_progress)
        in_val = validation_documents(len(documents), val_fraction, seed)
        stream = encoded(pieces(documents, in_val), encoder, workers or _cores())
        records = _write(stream, staging, shard_tokens, len(documents), on_progress)
        manifest = Manifest(**dict(plan), train=records["train"], val=records["val"])
        if not manifest.train.text_bytes + manifest.val.text_bytes:
            raise UserError(f"{source} holds no text: every document is empty", hint="is it the right field?")
        _commit(staging, out, manifest)
    return manifest


def validation_documents(documents: int, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which documents are validation, shape (documents,): those of `datasets`' train_test_split.

    Raises:
        UserError: nothing would be left for training.
    """
    in_val = np.zeros(documents, dtype=np.bool_)
    if fraction > 0:
        index = datasets.Dataset.from_dict({"document": np.arange(documents)})
        try:
            parts = index.train_test_split(test_size=fraction, seed=seed, shuffle=True)
        except ValueError:
            raise UserError(
                f"of {documents:,} document(s) none is left to train on with a val fraction of {fraction}",
                hint="--val-fraction 0 keeps all for training; or give more documents, or a smaller share",
            ) from None
        in_val[parts["test"].with_format("numpy")["document"][:]] = True
    return in_val


def published_difference(manifest: Manifest) -> str | None:
    """What to say when OpenWebText, prepared with the defaults, has not its published token counts."""
    record = manifest.source
    with_defaults = (
        manifest.tokenizer.name == "gpt2"
        and record.limit_documents is None
        and manifest.split == SplitRule(val_fraction=DEFAULT_VAL_FRACTION, seed=DEFAULT_SEED)
    )
    if record.id != f"hub:{OPENWEBTEXT_HUB}" or not with_defaults:
        return None
    found = {split: manifest.split_record(split).tokens for split in SPLITS}
    if found == PUBLISHED_OPENWEBTEXT:
        return None
    return (
        f"this is not the published OpenWebText: {found['train']:,} train and {found['val']:,} val tokens "
        f"in place of {PUBLISHED_OPENWEBTEXT['train']:,} and {PUBLISHED_OPENWEBTEXT['val']:,}, "
        "so losses will not compare"
    )


# --- the shards --------------------------------------------------------------------------------


def _write(
    stream: Iterable[tuple[Piece, npt.NDArray[np.uint16]]],
    folder: Path,
    shard_tokens: int,
    total: int,
    on_progress: Callable[[Progress], None],
) -> dict[str, SplitRecord]:
    """Write an ordered stream of tokens into the shards of both splits; their records."""
    writers = {split: ShardWriter(folder, split, shard_tokens) for split in SPLITS}
    documents = tokens = text_bytes = reported = 0
    with ExitStack() as stack:
        for writer in writers.values():
            stack.callback(writer.abort)
        for piece, piece_tokens in stream:
            writers[piece.split].add(piece_tokens, len(piece.text), ends_document=piece.ends_document)
            documents += piece.ends_document
            tokens += len(piece_tokens)
            text_bytes += len(piece.text)
            if text_bytes - reported >= PIECE_BYTES or documents == total:
                reported = text_bytes
                on_progress(Progress(documents, total, tokens, text_bytes))
        return {split: writer.close() for split, writer in writers.items()}


# --- the folder --------------------------------------------------------------------------------


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """The folder `.tmp-NAME` beside `out`, empty and held by this process; gone afterwards."""
    target = out.resolve()
    staging = target.parent / f"{files.TEMPORARY_PREFIX}{target.name}"
    try:
        with files.exclusive(staging):
            for leftover in staging.iterdir():
                if leftover.name != ".lock":
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            try:
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise RunFailed(
            f"cannot write {out}: {error.strerror or error}",
            hint="free space (two bytes a token, and the text once while working), or choose another --out",
        ) from error


def _commit(staging: Path, out: Path, manifest: Manifest) -> None:
    write_manifest(staging, manifest)
    shutil.rmtree(staging / "documents", ignore_errors=True)
    (staging / ".lock").unlink()
    files.fsync_path(staging)
    target = out.resolve()
    staging.rename(target)
    files.fsync_path(target.parent)


def _existing(out: Path, plan: Plan) -> Manifest | None:
    """The manifest of `out` if it holds what `plan` would make; None if nothing is there.

    Raises:
        UserError: something else is there.
    """
    elsewhere = "choose another folder with --out, or delete this one"
    if out.resolve().is_mount():
        raise UserError(f"{out} is a mount point, which cannot be renamed", hint=f"--out {out / 'NAME'}")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_FILE).is_file():
        raise UserError(f"{out} exists and is no prepared data", hint=elsewhere)
    manifest = read_manifest(out)
    differences = _differences(plan.model_dump(), manifest.plan.model_dump())
    if differences:
        raise UserError(f"{out} holds other data: {'; '.join(differences[:3])}", hint=elsewhere)
    open_data(out)
    return manifest


def _differences(wanted: dict[str, object], found: dict[str, object], prefix: str = "") -> list[str]:
    """`key is X, not Y` for each leaf in which two nested records differ."""
    differences = []
    for key, value in wanted.items():
        other, name = found[key], f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(other, dict):
            differences += _differences(value, other, f"{name}.")
        elif value != other:
            brief = isinstance(value, (str, int, float)) and isinstance(other, (str, int, float))
            differences.append(f"{name} is {other!r}, not {value!r}" if brief else f"{name} differ(s)")
    return differences


def _load(
    opened: Source, source: str, on_note: Callable[[str], None], on_progress: Callable[[Progress], None]
) -> Documents:
    if opened.skipped:
        on_note(f"skipping {len(opened.skipped)} file(s) of other kinds, such as {opened.skipped[0]}")
    size = sum(file.bytes for file in opened.record.files)
    on_note(f"reading {source}: {len(opened.record.files):,} file(s), {size / 1e6:,.1f} MB")
    return opened.load(lambda read: on_progress(Progress(read, None, 0, 0)))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_options(
    val_fraction: float, seed: int, shard_tokens: int, workers: int | None, limit: int | None
) -> None:
    if not 0 <= val_fraction < 1:
        raise UserError(
            f"the val fraction is {val_fraction}, outside 0 <= fraction < 1",
            hint="0.0005 takes one document in 2,000; 0 takes none",
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"the seed is {seed}, outside 0 to {2**32 - 1}", hint="2357 is nanoGPT's")
    if not 1 <= shard_tokens <= MAX_SHARD_TOKENS // 2:
        raise UserError(
            f"{shard_tokens:,} tokens a shard is outside 1 to {MAX_SHARD_TOKENS // 2:,}", hint="100M is usual"
        )
    if workers is not None and workers < 1:
        raise UserError(f"{workers} workers cannot work", hint="leave --workers out for one a core")
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} documents leaves nothing", hint="give at least 1")
