"""Temporary folder of a preparation, and the check of its target.

`.tmp-NAME/shards` becomes `NAME` in one rename. The journal next to it remains until then, so a
preparation killed at any time can resume.
"""

import errno
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from llmtrain.data.cache import cache_folder
from llmtrain.data.journal import JOURNAL_FILE
from llmtrain.data.manifest import (
    MANIFEST_FILE,
    Manifest,
    PrepareSpec,
    read_manifest,
    write_manifest,
)
from llmtrain.data.token_data import open_data
from llmtrain.errors import RunFailed, UserError
from llmtrain.storage.commit import commit_folder, temporary_folder, temporary_path
from llmtrain.storage.disk import NO_ROOM, concerns, free_bytes


@dataclass
class StagingFolder:
    """`.tmp-NAME` in the target's parent, locked by this process."""

    folder: Path
    target: Path
    remaining_bytes: int | None = None
    """Estimate of the bytes still to write."""

    @property
    def shards(self) -> Path:
        """The folder that becomes the target."""
        return self.folder / "shards"

    @property
    def documents(self) -> Path:
        """Downloaded or extracted text, which is deleted at the end."""
        return self.folder / "documents"

    @property
    def journal(self) -> Path:
        """The journal of finished shards."""
        return self.folder / JOURNAL_FILE

    @property
    def finished_shards(self) -> list[Path]:
        """The shards that have their final names."""
        return list(self.shards.glob("[!.]*.bin"))

    def discard_shards(self) -> None:
        """Delete the shards, so that nothing is resumed."""
        shutil.rmtree(self.shards)

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest and rename the shards' folder to the target."""
        write_manifest(self.shards, manifest)
        commit_folder(self.shards, self.target)


@contextmanager
def staged(out: Path) -> Iterator[StagingFolder]:
    """Lock and yield the folder in which `out` is built. At the end, keep only finished shards.

    Raises:
        UserError: another process builds `out`.
        RunFailed: a write failed; the message contains the free and the needed space.
    """
    target = out.resolve()
    staging = StagingFolder(temporary_path(target), target)
    created = [folder for folder in target.parents if not folder.exists()]
    try:
        with temporary_folder(target, resumable=True):
            for leftover in staging.folder.iterdir():
                if leftover.name not in {staging.shards.name, staging.journal.name}:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            staging.shards.mkdir(exist_ok=True)
            try:
                yield staging
            finally:
                shutil.rmtree(staging.documents, ignore_errors=True)
                if not staging.finished_shards:
                    shutil.rmtree(staging.folder, ignore_errors=True)
    except OSError as error:
        raise _write_failed(out, staging, error) from error
    finally:
        for folder in created:  # only empty ones: rmdir fails on others
            with suppress(OSError):
                folder.rmdir()


def _write_failed(out: Path, staging: StagingFolder, error: OSError) -> RunFailed:
    is_elsewhere = error.filename and not concerns(staging.target, error.filename)
    message = f"cannot write {error.filename if is_elsewhere else out}: {error.strerror or error}"
    hint = "choose another folder with --out"
    if staging.folder.is_relative_to(cache_folder().resolve()):
        hint = "set another folder to build in: LLMTRAIN_CACHE=FOLDER"
    if error.errno in NO_ROOM:
        needed = staging.remaining_bytes
        estimate = "" if needed is None else f"about {needed:,} bytes needed, "
        message += f" ({estimate}{free_bytes(staging.folder):,} bytes free)"
        hint = f"free space, or {hint}"
    if error.errno == errno.EFBIG:
        hint = "raise the shell's limit on file sizes (ulimit -f), or lower --shard-tokens"
    with suppress(OSError):  # a name that is too long
        if finished := len(staging.finished_shards):
            hint += f"; the same command resumes after the {finished:,} finished shard(s)"
    return RunFailed(message, hint=hint)


def existing_data(out: Path, spec: PrepareSpec) -> Manifest | None:
    """Return the manifest of `out` if it contains the data of `spec`, or None if it is empty.

    Raises:
        UserError: `out` contains anything else, or is a mount point.
    """
    if out.resolve().is_mount():
        raise UserError(
            f"{out} is a mount point, which cannot be renamed",
            hint=f"choose a folder in it: --out {shlex.quote(str(out / 'NAME'))}",
        )
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_FILE).is_file():
        raise UserError(
            f"{out} exists and is not a data folder", hint="choose another folder with --out"
        )
    manifest = read_manifest(out)
    manifest.require_spec(spec, str(out))
    open_data(out)
    return manifest
