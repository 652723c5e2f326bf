"""Prepared data behind a URL: written there, and copied here to be read.

Why copies: training reads at random, and a preparation must be able to stop half-way, so both work on
local folders and whole files travel. Behind a URL, too, a folder with a manifest is complete: the
manifest is the last to be written.

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
from llmtrain.errors import RunFailed, UserError
from llmtrain.storage.commit import commit_folder, temporary_folder
from llmtrain.storage.urls import download, file_system, is_url, local_path, url_errors


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
    with url_errors(place):
        content = system.cat_file(path) if system.exists(path) else None
    return None if content is None else parse_manifest(content, place)


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
    if folder.exists():
        return folder
    try:
        with temporary_folder(folder, resumable=True, wait=True) as partial:
            if not folder.exists():
                _copy(path, manifest, partial, folder, say)
    except OSError as error:
        raise RunFailed(
            f"cannot write {folder}: {error.strerror or error}",
            hint="free space, or name another folder for copies: LLMTRAIN_CACHE=FOLDER",
        ) from error
    return folder


def _copy(
    url: str, manifest: Manifest, partial: Path, folder: Path, say: Callable[[str], None]
) -> None:
    shards = [shard for split in SPLITS for shard in manifest.split_record(split).shards]
    missing = [shard for shard in shards if not (partial / shard.name).exists()]
    size = sum(HEADER_BYTES + TOKEN_BYTES * shard.tokens for shard in missing)
    say(f"copying {url} to {folder}: {len(missing):,} file(s), {size / 1e6:,.1f} MB")
    for shard in missing:
        download(f"{url.rstrip('/')}/{shard.name}", partial / shard.name, sha256=shard.sha256)
    write_manifest(partial, manifest)
    commit_folder(partial, folder)
