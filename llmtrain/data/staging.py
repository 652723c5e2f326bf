"""Temporary folder of a preparation, with a journal of its finished shards.

`.tmp-NAME/shards` becomes `NAME` in one rename. The journal next to it remains until then, so a
preparation killed at any time can resume. A shard ends with a document, so the documents in the
finished shards determine where a split resumes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmtrain.data.manifest import (
    MANIFEST_FILE,
    SPLITS,
    Manifest,
    PrepareSpec,
    ShardRecord,
    read_manifest,
    shard_name,
    write_manifest,
)
from llmtrain.data.shards import shard_problem
from llmtrain.data.token_data import open_data
from llmtrain.errors import RunFailed, UserError
from llmtrain.storage import commit
from llmtrain.storage.disk import disk_errors
from llmtrain.storage.file_systems import fsync
from llmtrain.storage.safe_files import delete, make_own_folder, open_own

JOURNAL_FILE = "journal.jsonl"
_JOURNAL_VERSION = 1

Log = Callable[[str], None]


class StagingFolder:
    """`.tmp-NAME` in the target's parent; see `staged`."""

    def __init__(self, out: Path) -> None:
        self.target = out.resolve()
        self.folder = commit.temporary_path(self.target)
        self.shards = self.folder / "shards"
        self.documents = self.folder / "documents"
        """Downloaded or extracted text, which is deleted at the end."""
        self.journal = self.folder / JOURNAL_FILE

    def records_sha256(self) -> bool:
        """Return whether an earlier version wrote this data or its unfinished build."""
        if (self.target / MANIFEST_FILE).is_file():
            return read_manifest(self.target).source.records_sha256
        header = next(iter(_read_entries(self.journal)), {})
        files = header.get("plan", {}).get("source", {}).get("files", [])
        return any(file.get("sha256") for file in files)

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest and rename the shards' folder to the target."""
        write_manifest(self.shards, manifest)
        commit.commit_folder(self.shards, self.target)


@contextmanager
def staged(out: Path) -> Iterator[StagingFolder]:
    """Lock and yield the folder in which `out` is built. At the end, keep only finished shards."""
    staging = StagingFolder(out)
    created = [folder for folder in staging.target.parents if not folder.exists()]
    try:
        with disk_errors(out), commit.temporary_folder(staging.target):
            for leftover in staging.folder.iterdir():
                if leftover.name not in {staging.shards.name, JOURNAL_FILE, commit.RESUMABLE}:
                    delete(leftover)
            make_own_folder(staging.shards)
            try:
                yield staging
            finally:
                shutil.rmtree(staging.documents, ignore_errors=True)
                if not any(staging.shards.glob("[!.]*.bin")):
                    with suppress(OSError):  # it was moved; the next command deletes the rest
                        commit.clear(staging.folder)
    except OSError as error:
        hint = "choose another folder with --out"
        raise RunFailed(f"cannot write {out}: {error}", hint=hint) from error
    finally:
        for folder in created:  # only empty ones: rmdir fails on others
            with suppress(OSError):
                folder.rmdir()


def existing_data(out: Path, spec: PrepareSpec) -> Manifest | None:
    """Return the manifest of `out` if it contains the data of `spec`, or None if it is empty.

    Raise a UserError for anything else, also for a mount point, which cannot be renamed.
    """
    is_empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if is_empty and not out.resolve().is_mount():
        return None
    if not (out / MANIFEST_FILE).is_file():
        hint = "choose another folder with --out"
        raise UserError(f"{out} exists and is not a data folder", hint=hint)
    manifest = read_manifest(out)
    manifest.require_spec(spec, str(out))
    open_data(out)
    return manifest


class Journal:
    """The finished shards and document counts of one spec; see `Journal.open`.

    A line is appended and flushed after its shard is durable. Each line contains its own hash.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.counts: list[int] = []
        self.layout = ""
        """Hash of the partitions that were counted; empty before counting."""
        self.shards: dict[str, list[ShardRecord]] = {split: [] for split in SPLITS}

    @classmethod
    def open(cls, staging: StagingFolder, spec: PrepareSpec, log: Log) -> "Journal":
        """Read the journal of `spec`; drop entries and shards that do not match."""
        journal = cls(staging.journal)
        header = {"journal": _JOURNAL_VERSION, "plan": spec.model_dump(mode="json")}
        entries = _read_entries(staging.journal)
        kept = [header]
        if entries[:1] == [header]:
            kept += [each for each in entries[1:] if journal._restore(each, staging.shards, log)]
        elif any(staging.shards.iterdir()):
            log("an interrupted prepare had other options or another source: starting over")
        valid = {record.name for record in journal.finished}
        for path in staging.shards.iterdir():
            if path.name not in valid:
                delete(path)
        commit.write_atomically(staging.journal, "".join(map(_line, kept)))
        return journal

    @property
    def finished(self) -> list[ShardRecord]:
        """The finished shards of both splits."""
        return [record for split in SPLITS for record in self.shards[split]]

    def set_counts(self, counts: list[int], layout: str) -> None:
        """Record the number of documents in each partition of a layout."""
        self.counts, self.layout = counts, layout
        self._append({"counts": counts, "layout": layout})

    def add_shard(self, record: ShardRecord) -> None:
        """Record a durable shard."""
        self.shards[record.split].append(record)
        self._append({"shard": record.model_dump(mode="json")})

    def _append(self, entry: dict[str, Any]) -> None:
        with os.fdopen(open_own(self._path, os.O_WRONLY | os.O_APPEND), "a") as file:
            file.write(_line(entry))
            file.flush()
            fsync(file.fileno(), self._path)

    def _restore(self, entry: dict[str, Any], folder: Path, log: Log) -> bool:
        """Restore an entry; return False for a damaged shard and for those after it."""
        if "counts" in entry:
            self.counts, self.layout = entry["counts"], entry["layout"]
            return True
        record = ShardRecord.model_validate(entry["shard"])
        if record.name != shard_name(record.split, len(self.shards[record.split])):
            return False
        path = folder / record.name
        if problem := shard_problem(folder, record) or record.hash_problem(path):
            log(f"{problem}: resuming before it")
            return False
        self.shards[record.split].append(record)
        return True


def _line(entry: dict[str, Any]) -> str:
    return json.dumps({"entry": entry, "sha256": _hash(entry)}, sort_keys=True) + "\n"


def _hash(entry: object) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _read_entries(path: Path) -> list[dict[str, Any]]:
    """Return the entries before the first torn or damaged line."""
    entries = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            document = json.loads(line)
            if document["sha256"] != _hash(document["entry"]):
                break
        except (ValueError, KeyError, TypeError, RecursionError):
            break
        entries.append(document["entry"])
    return entries
