"""Prepared data behind a URL: written there, and copied here to be read.

Why copies: training reads at random, and a preparation must be able to stop half-way, so both work on
local folders and whole files travel. Behind a URL, too, a folder with a manifest is complete: the
manifest is the last to be written.

    folder = local_folder("s3://bucket/openwebtext")
"""

import fcntl
import hashlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtrain.data.manifest import (
    MANIFEST_FILE,
    SPLITS,
    Manifest,
    ShardRecord,
    parse_manifest,
    write_manifest,
)
from llmtrain.data.token_files import HEADER_BYTES, TOKEN_BYTES
from llmtrain.errors import RunFailed, UserError
from llmtrain.storage import commit
from llmtrain.storage.urls import file_system, is_url, local_path, open_url, reading

_COPY_BYTES = 1 << 22


def cache_folder() -> Path:
    """Where copies are kept: $LLMTRAIN_CACHE, else `~/.cache/llmtrain`."""
    return Path(os.environ.get("LLMTRAIN_CACHE") or Path.home() / ".cache" / "llmtrain")


def workplace(url: str) -> Path:
    """The local folder in which the data is built that is to be copied to `url`."""
    return cache_folder() / "prepare" / hashlib.sha256(url.encode()).hexdigest()[:16]


def published(url: str) -> Manifest | None:
    """The manifest of the folder behind `url`; None where there is none.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    place = f"{url.rstrip('/')}/{MANIFEST_FILE}"
    system, path = file_system(place)
    with reading(place):
        content = system.cat_file(path) if system.exists(path) else None
    return None if content is None else parse_manifest(content, place)


def upload(folder: Path, url: str, before_each: Callable[[], None] = lambda: None) -> None:
    """Copy a prepared folder to `url`, its manifest last.

    Args:
        folder: where it is.
        url: where it goes; what an earlier copy left there is written again.
        before_each: called before each file; may raise to stop.

    Raises:
        RunFailed: something cannot be written there.
    """
    system, base = file_system(url)
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST_FILE)
    with _writing(url, folder):
        system.makedirs(base, exist_ok=True)
    for name in [*names, MANIFEST_FILE]:
        before_each()
        with _writing(url, folder):
            size, target = (folder / name).stat().st_size, f"{base.rstrip('/')}/{name}"
            system.put_file(str(folder / name), target)
            if system.size(target) != size:
                raise OSError(f"{name} has {system.size(target):,} bytes there instead of {size:,}")


@contextmanager
def _writing(url: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RunFailed(
            f"cannot write {url}: {str(error) or type(error).__name__}",
            hint=f"the shards are whole in {folder}: the same command copies them again",
        ) from error


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def local_folder(path: str, say: Callable[[str], None] = _say) -> Path:
    """A local folder with the data that `path` names: itself, or for a URL a checked copy in the cache.

    A copy that was interrupted goes on with the next file. Processes that ask for the same data wait
    for the one that copies.

    Args:
        path: a folder or a URL, as in `data.path`.
        say: told once what is copied, and how much.

    Raises:
        UserError: there is no prepared data behind the URL, or it is not what its manifest says.
        RunFailed: there is no room for the copy.
    """
    if not is_url(path):
        return Path(local_path(path))
    manifest = published(path)
    if manifest is None:
        raise UserError(
            f"{path} holds no prepared data ({MANIFEST_FILE} is missing)",
            hint=f"prepare it: llmtrain prepare SOURCE --out {shlex.quote(path)}",
        )
    folder = cache_folder() / "data" / manifest.sha256
    try:
        with _one_at_a_time(folder):
            if not folder.exists():
                _copy(path, manifest, folder, say)
    except OSError as error:
        raise RunFailed(
            f"cannot write {folder}: {error.strerror or error}",
            hint="free space, or name another folder for copies: LLMTRAIN_CACHE=FOLDER",
        ) from error
    return folder


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _copy(url: str, manifest: Manifest, folder: Path, say: Callable[[str], None]) -> None:
    staging = folder.with_name(f"{commit.TEMPORARY_PREFIX}{folder.name}")
    staging.mkdir(exist_ok=True)
    shards = [shard for split in SPLITS for shard in manifest.split_record(split).shards]
    missing = [shard for shard in shards if not (staging / shard.name).exists()]
    size = sum(HEADER_BYTES + TOKEN_BYTES * shard.tokens for shard in missing)
    say(f"copying {url} to {folder}: {len(missing):,} file(s), {size / 1e6:,.1f} MB")
    for shard in missing:
        _copy_shard(f"{url.rstrip('/')}/{shard.name}", shard, staging)
    write_manifest(staging, manifest)
    commit.fsync_path(staging)
    staging.rename(folder)
    commit.fsync_path(folder.parent)


def _copy_shard(url: str, shard: ShardRecord, folder: Path) -> None:
    """Copy one file; it has its name once it is durable and has the hash that the manifest says."""
    partial = folder / f"{commit.TEMPORARY_PREFIX}{shard.name}"
    digest = hashlib.sha256()
    with partial.open("wb") as target, reading(url), open_url(url) as source:
        while content := source.read(_COPY_BYTES):
            digest.update(content)
            target.write(content)
    if digest.hexdigest() != shard.sha256:
        partial.unlink()
        raise UserError(
            f"{url} has another SHA-256 than its manifest records",
            hint="copy or prepare it there again",
        )
    commit.fsync_path(partial)
    partial.replace(folder / shard.name)
