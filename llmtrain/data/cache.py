"""Data folders behind URLs: local build folders and local copies.

Training reads at random and a preparation must be resumable, so both use local folders, and whole
files are transferred. A folder behind a URL, too, is complete if it has a manifest.
"""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

from llmtrain.data.manifest import MANIFEST_FILE, Manifest, no_data, parse_manifest, write_manifest
from llmtrain.data.shards import shard_bytes
from llmtrain.errors import printable
from llmtrain.storage.cache import cache_folder
from llmtrain.storage.commit import commit_folder, temporary_folder
from llmtrain.storage.disk import disk_errors
from llmtrain.storage.safe_files import make_own_folder
from llmtrain.storage.urls import download, file_system, is_url, local_path, url_errors


def build_folder(url: str) -> Path:
    """Return the local folder in which the data of `url` is built before it is uploaded."""
    return cache_folder() / "prepare" / hashlib.sha256(url.encode()).hexdigest()[:16]


def read_manifest_at(url: str) -> Manifest | None:
    """Read the manifest of the folder at `url`; return None if it does not exist."""
    manifest_url = f"{url.rstrip('/')}/{MANIFEST_FILE}"
    system, path = file_system(manifest_url)
    with url_errors(manifest_url):
        content = system.cat_file(path) if system.exists(path) else None
    return None if content is None else parse_manifest(content, manifest_url)


def _log_to_stderr(line: str) -> None:
    sys.stderr.write(printable(line) + "\n")


def local_folder(path: str, log: Callable[[str], None] = _log_to_stderr) -> Path:
    """Return a local folder with the data at `path`: itself, or a verified copy of a URL.

    An interrupted copy resumes with the next file. Only one process copies, others wait for it.
    """
    if not is_url(path):
        return Path(local_path(path))
    manifest = read_manifest_at(path)
    if manifest is None:
        raise no_data(path)
    folder = cache_folder() / "data" / manifest.sha256
    if folder.exists():
        return folder
    with disk_errors(folder), temporary_folder(folder, wait=True) as build:
        if not folder.exists():
            make_own_folder(build / "shards")
            _copy(path, manifest, build / "shards", folder, log)
    return folder


def _copy(
    url: str, manifest: Manifest, partial: Path, folder: Path, log: Callable[[str], None]
) -> None:
    missing = [shard for shard in manifest.shards if not (partial / shard.name).exists()]
    size = sum(shard_bytes(shard.tokens) for shard in missing)
    log(f"copying {url} to {folder}: {len(missing):,} file(s), {size / 1e6:,.1f} MB")
    for shard in missing:
        source = f"{url.rstrip('/')}/{shard.name}"
        download(source, partial / shard.name, problem=shard.hash_problem)
    write_manifest(partial, manifest)
    commit_folder(partial, folder)
