"""Prepared data behind a URL: local copies for training, and the manifest there.

Why copies: training reads in random order. The manifest is uploaded last, so a URL with a manifest
is complete.

    folder = local_folder("s3://bucket/openwebtext")
"""

import hashlib
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from llmtrain.data.manifest import (
    MANIFEST_FILE,
    SPLITS,
    Manifest,
    parse_manifest,
    write_manifest,
)
from llmtrain.data.token_files import HEADER_BYTES, TOKEN_BYTES
from llmtrain.errors import UserError
from llmtrain.storage.commit import commit_folder, temporary_folder
from llmtrain.storage.disk import disk_errors
from llmtrain.storage.urls import download, file_system, is_url, local_path, url_errors


def cache_folder() -> Path:
    """Return the cache for copies: $LLMTRAIN_CACHE, or `~/.cache/llmtrain`."""
    return Path(os.environ.get("LLMTRAIN_CACHE") or Path.home() / ".cache" / "llmtrain")


def workplace(url: str) -> Path:
    """Return the local folder in which data for `url` is built."""
    return cache_folder() / "prepare" / hashlib.sha256(url.encode()).hexdigest()[:16]


def published(url: str) -> Manifest | None:
    """Return the manifest at `url`; None if it is missing.

    Raises:
        UserError: the manifest cannot be read or is damaged.
    """
    place = f"{url.rstrip('/')}/{MANIFEST_FILE}"
    system, path = file_system(place)
    with url_errors(place):
        content = system.cat_file(path) if system.exists(path) else None
    return None if content is None else parse_manifest(content, place)


def _print_note(line: str) -> None:
    sys.stderr.write(line + "\n")


def local_folder(path: str, log: Callable[[str], None] = _print_note) -> Path:
    """Return a local folder with the prepared data of `path`; for a URL, a verified cached copy.

    An interrupted copy resumes with the next file. Other processes wait for the one that copies.

    Args:
        path: a folder or a URL, as in `data.path`.
        log: receives one line if something is copied.

    Raises:
        UserError: the URL has no prepared data, or it does not match its manifest.
        RunFailed: the copy cannot be written.
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
    if not folder.exists():
        with (
            disk_errors(folder, elsewhere="set LLMTRAIN_CACHE=FOLDER"),
            temporary_folder(folder, resumable=True, wait=True) as partial,
        ):
            if not folder.exists():
                _copy(path, manifest, partial, folder, log)
    return folder


def _copy(
    url: str, manifest: Manifest, partial: Path, folder: Path, log: Callable[[str], None]
) -> None:
    shards = [shard for split in SPLITS for shard in manifest.split_record(split).shards]
    missing = [shard for shard in shards if not (partial / shard.name).exists()]
    size = sum(HEADER_BYTES + TOKEN_BYTES * shard.tokens for shard in missing)
    log(f"copying {url} to {folder}: {len(missing):,} file(s), {size / 1e6:,.1f} MB")
    for shard in missing:
        download(f"{url.rstrip('/')}/{shard.name}", partial / shard.name, sha256=shard.sha256)
    write_manifest(partial, manifest)
    commit_folder(partial, folder)
