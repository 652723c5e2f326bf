"""The folder in which data is built, and the step that gives it its name.

Why a folder around the shards: `.tmp-NAME/shards` becomes `NAME` in one rename, and the journal
beside it is there until after that; so a kill at any instant leaves something to go on from.

    with staged(Path("data/web"), need) as staging: ...; staging.commit(manifest)
"""

import errno
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from llmtrain.data.copies import cache_folder
from llmtrain.data.journal import JOURNAL_FILE
from llmtrain.data.manifest import (
    MANIFEST_FILE,
    Manifest,
    PrepareSpec,
    read_manifest,
    write_manifest,
)
from llmtrain.data.shards import open_data
from llmtrain.errors import RunFailed, UserError
from llmtrain.storage.commit import commit_folder, temporary_folder, temporary_path
from llmtrain.storage.disk import NO_ROOM, concerns


@dataclass
class Need:
    """About how many bytes are still to be written; None while that is not known."""

    bytes: int | None = None


@dataclass(frozen=True)
class Staging:
    """`.tmp-NAME` beside the target, held by this process."""

    folder: Path
    target: Path

    @property
    def shards(self) -> Path:
        """What becomes the target."""
        return self.folder / "shards"

    @property
    def documents(self) -> Path:
        """Text that had to be written before it can be read in parts; of no use to the next process."""
        return self.folder / "documents"

    @property
    def journal(self) -> Path:
        """What is finished; see `Journal`."""
        return self.folder / JOURNAL_FILE

    def discard(self) -> None:
        """Of shards that no later start can use, none is kept."""
        shutil.rmtree(self.shards)

    def commit(self, manifest: Manifest) -> None:
        """Give the shards their name."""
        write_manifest(self.shards, manifest)
        commit_folder(self.shards, self.target)


@contextmanager
def staged(out: Path, need: Need) -> Iterator[Staging]:
    """Hold the folder in which `out` is built. Afterwards only finished shards are kept, to go on from.

    Raises:
        UserError: another process builds `out`.
        RunFailed: something cannot be written; says how much space there is, and is `need`ed.
    """
    target = out.resolve()
    staging = Staging(temporary_path(target), target)
    new = [folder for folder in target.parents if not folder.exists()]
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
                if not list(staging.shards.glob("[!.]*.bin")):
                    shutil.rmtree(staging.folder, ignore_errors=True)
    except OSError as error:
        raise _cannot_write(out, staging, error, need) from error
    finally:
        for folder in new:  # made for nothing; one that holds something refuses
            with suppress(OSError):
                folder.rmdir()


def _cannot_write(out: Path, staging: Staging, error: OSError, need: Need) -> RunFailed:
    elsewhere = error.filename and not concerns(staging.target, error.filename)
    message = f"cannot write {error.filename if elsewhere else out}: {error.strerror or error}"
    hint = "choose another place with --out"
    if staging.folder.is_relative_to(cache_folder().resolve()):
        hint = "build it in another place: LLMTRAIN_CACHE=FOLDER"
    if error.errno in NO_ROOM:
        parent = next(path for path in staging.folder.parents if path.is_dir())
        wanted = "" if need.bytes is None else f"about {_size(need.bytes)} more are needed, "
        message += f" ({wanted}{_size(shutil.disk_usage(parent).free)} are free)"
        hint = f"free space, or {hint}"
        if error.errno == errno.EFBIG:
            hint = (
                "the shell limits the size of a file (ulimit -f): raise it, or lower --shard-tokens"
            )
    finished = 0
    with suppress(OSError):  # of a name that is too long, say
        finished = len(list(staging.shards.glob("[!.]*.bin")))
    if finished:
        hint += f"; the same command goes on after the {finished:,} finished shard(s)"
    return RunFailed(message, hint=hint)


def _size(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


# --- the target --------------------------------------------------------------------------------

_ELSEWHERE = "choose another folder with --out, or delete this one"


def existing(out: Path, plan: PrepareSpec) -> Manifest | None:
    """The manifest of `out` if it holds what `plan` would make; None if nothing is there.

    Raises:
        UserError: something else is there.
    """
    if out.resolve().is_mount():
        raise UserError(
            f"{out} is a mount point, which cannot be renamed",
            hint=f"--out {shlex.quote(str(out / 'NAME'))}",
        )
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_FILE).is_file():
        raise UserError(
            f"{out} exists and is no prepared data", hint="choose another folder with --out"
        )
    manifest = read_manifest(out)
    require_same(str(out), manifest, plan)
    open_data(out)
    return manifest


def require_same(place: str, manifest: Manifest, plan: PrepareSpec) -> None:
    """Check that the data in `place` is what `plan` would make.

    Raises:
        UserError: it is other data.
    """
    differences = _differences(plan.model_dump(), manifest.plan.model_dump())
    if differences:
        raise UserError(f"{place} holds other data: {'; '.join(differences[:3])}", hint=_ELSEWHERE)


def _differences(
    wanted: dict[str, object], found: dict[str, object], prefix: str = ""
) -> list[str]:
    """`key is X, not Y` for each leaf in which two nested records differ."""
    differences = []
    for key, value in wanted.items():
        other, name = found[key], f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(other, dict):
            differences += _differences(value, other, f"{name}.")
        elif value != other:
            brief = isinstance(value, (str, int, float)) and isinstance(other, (str, int, float))
            differences.append(
                f"{name} is {other!r}, not {value!r}" if brief else f"{name} differ(s)"
            )
    return differences
