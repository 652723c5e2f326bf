"""Documents to token shards: count, split, tokenize in parallel, write in order, commit at the end.

Why one ordered stream: what is written then depends on the documents and the seed alone, and only
a few megabytes a worker are in memory. The folder gets its name when the last byte is on disk, so it
is whole or not there. A prepare that was killed, or found the disk full, goes on when it is started
again: finished shards are kept, their documents are passed over, and the result is the same.

    manifest = prepare("openwebtext", Path("data/openwebtext"))
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtrain.data.build import Build, PrepareProgress
from llmtrain.data.copies import published, workplace
from llmtrain.data.encode import Engine, locally
from llmtrain.data.manifest import MANIFEST_FILE, SPLITS, Manifest, PrepareSpec, SplitRule
from llmtrain.data.shards import tokenizer_record
from llmtrain.data.sources import OPENWEBTEXT_HUB, Source, open_source
from llmtrain.data.staging import Need, existing, require_same, staged
from llmtrain.data.token_files import MAX_SHARD_TOKENS
from llmtrain.errors import UserError
from llmtrain.storage.urls import is_url, local_path, upload

DEFAULT_VAL_FRACTION = 0.0005
DEFAULT_SEED = 2357
DEFAULT_SHARD_TOKENS = 100_000_000
ENGINES = ("local", "ray")

PUBLISHED_OPENWEBTEXT = {"train": 9_035_582_198, "val": 4_434_897}
"""Tokens that nanoGPT's preparation of OpenWebText gives, and this one with its defaults."""


def _ignore(_: object) -> None:
    return None


def prepare(
    source: str,
    out: Path | str,
    *,
    tokenizer: str = "gpt2",
    val_fraction: float = DEFAULT_VAL_FRACTION,
    seed: int = DEFAULT_SEED,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    workers: int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    text_field: str = "text",
    limit_documents: int | None = None,
    on_progress: Callable[[PrepareProgress], None] = _ignore,
    on_note: Callable[[str], None] = _ignore,
) -> Manifest:
    """Write the tokens of `source` to the folder `out`; its manifest.

    Args:
        source: see `sources.open_source`.
        out: the data folder, or a URL; then the shards are built in `copies.workplace` and copied.
            When it holds this very data already, nothing is done.
        tokenizer: "gpt2" or "byte".
        val_fraction: share of documents for the val split, rounded up; 0 for an empty one.
        seed: of the split.
        shard_tokens: a shard ends with the document that brings it to so many tokens.
        workers: threads that tokenize (default: one a core). The output does not depend on it.
        engine: "local", or "ray" for a cluster's CPUs. The output does not depend on it.
        ray_address: where that cluster is; see `ray_engine.on_ray`.
        text_field: the field or column that holds the text.
        limit_documents: take only so many documents, from the first.
        on_progress: called every few megabytes.
        on_note: called with sentences that a person should see.

    Raises:
        UserError: the source cannot be read, an option is out of range, or `out` holds other data.
        RunFailed: the disk is full or failed.
    """
    _check_options(val_fraction, seed, shard_tokens, workers, limit_documents)
    _check_engine(engine, workers, ray_address)
    url = str(out) if is_url(str(out)) else None
    folder = Path(local_path(str(out))) if url is None else workplace(url)
    need = Need()
    with staged(folder, need) as staging:
        opened = open_source(source, text_field, limit_documents, staging.documents)
        plan = PrepareSpec(
            tokenizer=tokenizer_record(tokenizer),
            source=opened.record,
            split=SplitRule(val_fraction=val_fraction, seed=seed),
            shard_tokens=shard_tokens,
        )
        manifest = existing(folder, plan) if url is None else _published(url, plan)
        if manifest is not None:
            on_note(f"{out} holds this data already: nothing to do")
            shutil.rmtree(staging.shards)
            return manifest
        manifest = _left_to_upload(folder, plan) if url else None
        if manifest is None:
            need.bytes = _announce(source, opened, on_note)
            threads = 1 if engine == "ray" else workers or _cores()
            with _engine(engine, ray_address) as run:
                manifest = Build(
                    opened, plan, staging, run, threads, need, on_note, on_progress
                ).run()
            staging.commit(manifest)
        if url is not None:
            on_note(f"copying the shards to {url}")
            written = manifest
            upload(
                folder,
                url,
                last=MANIFEST_FILE,
                before_each=lambda: on_progress(PrepareProgress.whole(written)),
            )
            shutil.rmtree(folder)
    return manifest


def _announce(source: str, opened: Source, on_note: Callable[[str], None]) -> int:
    """Say what will be read; its size in bytes."""
    if opened.skipped:
        on_note(
            f"skipping {len(opened.skipped)} file(s) of other kinds, such as {opened.skipped[0]}"
        )
    size = sum(file.bytes for file in opened.record.files)
    on_note(f"reading {source}: {len(opened.record.files):,} file(s), {size / 1e6:,.1f} MB")
    return size


def _published(url: str, plan: PrepareSpec) -> Manifest | None:
    manifest = published(url)
    if manifest is not None:
        require_same(url, manifest, plan)
    return manifest


def _left_to_upload(folder: Path, plan: PrepareSpec) -> Manifest | None:
    """What an earlier command has built and not copied; of another request, it goes."""
    try:
        return existing(folder, plan)
    except UserError:
        shutil.rmtree(folder)
        return None


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


@contextmanager
def _engine(name: str, ray_address: str | None) -> Iterator[Engine]:
    if name == "local":
        yield locally
        return
    from llmtrain.data.ray_engine import on_ray  # an extra: not everybody has it

    with on_ray(ray_address) as engine:
        yield engine


# --- options ---------------------------------------------------------------------------------


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_engine(engine: str, workers: int | None, ray_address: str | None) -> None:
    if engine not in ENGINES:
        raise UserError(f"unknown engine {engine!r}", hint=f"choose one of: {', '.join(ENGINES)}")
    if engine == "ray" and workers is not None:
        raise UserError(
            "--workers counts threads here, not those of a cluster", hint="leave it out"
        )
    if engine != "ray" and ray_address is not None:
        raise UserError("--ray-address needs --engine ray", hint="add it, or leave the address out")


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
            f"{shard_tokens:,} tokens a shard is outside 1 to {MAX_SHARD_TOKENS // 2:,}",
            hint="100M is usual",
        )
    if workers is not None and workers < 1:
        raise UserError(f"{workers} workers cannot work", hint="leave --workers out for one a core")
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} documents leaves nothing", hint="give at least 1")
