"""The temporary folder in which data is built, and the checks of an existing target.

Why a folder around the shards: `.tmp-NAME/shards` becomes `NAME` in one rename, and the journal
next to it remains until then, so a kill at any moment leaves something to resume.

    with staged(Path("data/web"), need) as staging: ...; staging.commit(manifest)
"""

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
from llmtrain.storage.disk import disk_errors


@dataclass
class Need:
    """Estimate of the bytes still to be written; None if unknown."""

    bytes: int | None = None


@dataclass(frozen=True)
class Staging:
    """The temporary folder `.tmp-NAME`, locked by this process."""

    folder: Path
    target: Path

    @property
    def shards(self) -> Path:
        """Folder that becomes the target."""
        return self.folder / "shards"

    @property
    def documents(self) -> Path:
        """Text that must be written before it can be read in parts; not resumable."""
        return self.folder / "documents"

    @property
    def journal(self) -> Path:
        """Record of the finished shards; see `Journal`."""
        return self.folder / JOURNAL_FILE

    def commit(self, manifest: Manifest) -> None:
        """Add the manifest and give the shards their final name."""
        write_manifest(self.shards, manifest)
        commit_folder(self.shards, self.target)


@contextmanager
def staged(out: Path, need: Need) -> Iterator[Staging]:
    """Lock the temporary folder of `out`; afterwards keep only finished shards and the journal.

    Raises:
        UserError: another process builds `out`.
        RunFailed: something cannot be written.
    """
    target = out.resolve()
    staging = Staging(temporary_path(target), target)
    new = [folder for folder in target.parents if not folder.exists()]
    in_cache = target.is_relative_to(cache_folder().resolve())
    elsewhere = "set LLMTRAIN_CACHE=FOLDER" if in_cache else "choose another folder with --out"
    try:
        with (
            disk_errors(out, needed=lambda: need.bytes, elsewhere=elsewhere),
            temporary_folder(target, resumable=True),
        ):
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
        raise RunFailed(
            f"cannot write {error.filename or out}: {error.strerror or error}", hint=elsewhere
        ) from error
    finally:
        for folder in new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


# --- the target --------------------------------------------------------------------------------

_ELSEWHERE = "choose another folder with --out, or delete this one"


def existing(out: Path, plan: PrepareSpec) -> Manifest | None:
    """Return the manifest of `out` if it was made by `plan`; None if `out` is empty or missing.

    Raises:
        UserError: `out` has other content.
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
            f"{out} exists and is not prepared data", hint="choose another folder with --out"
        )
    manifest = read_manifest(out)
    require_same(str(out), manifest, plan)
    open_data(out)
    return manifest


def require_same(place: str, manifest: Manifest, plan: PrepareSpec) -> None:
    """Raise UserError unless the data in `place` was made by `plan`."""
    differences = _differences(plan.model_dump(), manifest.plan.model_dump())
    if differences:
        raise UserError(f"{place} holds other data: {'; '.join(differences[:3])}", hint=_ELSEWHERE)


def _differences(
    wanted: dict[str, object], found: dict[str, object], prefix: str = ""
) -> list[str]:
    """Return `key is X, not Y` for each leaf that differs between two nested records."""
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
