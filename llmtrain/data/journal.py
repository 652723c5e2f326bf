"""Journal of an unfinished preparation: the finished shards, from which the next one resumes.

A shard ends with a document, so the documents in its finished shards determine where a split
resumes. A line is appended and flushed after its shard is durable. Each line contains its own hash,
and reading stops at the first invalid line.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtrain.data.manifest import SPLITS, PrepareSpec, ShardRecord, shard_name
from llmtrain.data.shards import hash_problem, shard_problem
from llmtrain.storage import commit

JOURNAL_FILE = "journal.jsonl"
_VERSION = 1


class Journal:
    """The finished shards and document counts of one spec; see `Journal.open`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.counts: list[int] = []
        """Documents of each partition of the input."""
        self.layout = ""
        """Hash of the partitions that were counted; empty before counting."""
        self.shards: dict[str, list[ShardRecord]] = {split: [] for split in SPLITS}
        """The finished shards of each split, in order."""

    @classmethod
    def open(
        cls, path: Path, shards: Path, spec: PrepareSpec, log: Callable[[str], None]
    ) -> "Journal":
        """Read the journal of `spec`; drop entries and files in `shards` that do not match."""
        journal = cls(path)
        entries = _read(path)
        header = {"journal": _VERSION, "plan": spec.model_dump(mode="json")}
        if entries[:1] == [header]:
            journal._restore(entries[1:], shards, log)
        elif any(shards.iterdir()):
            log("an interrupted prepare had other options or another source: starting over")
        valid = {record.name for record in journal.finished}
        for each in shards.iterdir():
            if each.name not in valid:
                each.unlink()
        commit.write_atomically(path, "".join(map(_line, [header, *journal._entries()])))
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
        with self._path.open("a") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())

    def _entries(self) -> list[dict[str, Any]]:
        counts = [{"counts": self.counts, "layout": self.layout}] if self.layout else []
        return counts + [{"shard": record.model_dump(mode="json")} for record in self.finished]

    def _restore(
        self, entries: list[dict[str, Any]], folder: Path, log: Callable[[str], None]
    ) -> None:
        """Restore the entries; of each split, only the shards before the first damaged one."""
        damaged = set()
        for entry in entries:
            if "counts" in entry:
                self.counts, self.layout = entry["counts"], entry["layout"]
                continue
            record = ShardRecord.model_validate(entry["shard"])
            if record.split in damaged:
                continue
            if problem := shard_problem(folder, record) or hash_problem(folder, record):
                damaged.add(record.split)
                log(f"{problem}: resuming before it")
            elif record.name == shard_name(record.split, len(self.shards[record.split])):
                self.shards[record.split].append(record)


def _line(entry: dict[str, Any]) -> str:
    return json.dumps({"entry": entry, "sha256": _hash(entry)}, sort_keys=True) + "\n"


def _hash(entry: object) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the entries before the first torn or damaged line."""
    entries = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            document = json.loads(line)
            if document["sha256"] != _hash(document["entry"]):
                break
        except (ValueError, KeyError, TypeError, RecursionError):
            break
        entries.append(document["entry"])
    return entries
