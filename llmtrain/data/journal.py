"""What a preparation has finished, so that the next one goes on from there.

Why only a list of shards: a shard ends with a document, so how many documents of a split are in its
finished shards says where that split goes on. A line is appended, and flushed, when what it says is
durable; each carries its own hash, and nothing after the first bad line is believed.

    journal = Journal.open(staging, plan, print); journal.add_shard(record)
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtrain.data.manifest import SPLITS, PrepareSpec, ShardRecord, shard_name
from llmtrain.data.token_files import shard_problem
from llmtrain.storage import commit, integrity

JOURNAL_FILE = "journal.jsonl"
_VERSION = 1


class Journal:
    """The journal of one plan; see `Journal.open`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.counts: list[int] = []
        """Documents of each partition of the input."""
        self.layout = ""
        """How the input was cut into partitions when they were counted; empty before."""
        self.shards: dict[str, list[ShardRecord]] = {split: [] for split in SPLITS}
        """The finished shards of each split, in order."""

    @classmethod
    def open(
        cls, path: Path, shards: Path, plan: PrepareSpec, on_note: Callable[[str], None]
    ) -> "Journal":
        """What is finished of `plan`: what the file `path` says and the folder `shards` confirms.

        The file then says just that, and `shards` holds just that.
        """
        journal = cls(path)
        entries = _read(path)
        request = {"journal": _VERSION, "plan": plan.model_dump(mode="json")}
        if entries[:1] == [request]:
            journal._believe(entries[1:], shards, on_note)
        elif any(shards.iterdir()):
            on_note(
                "what an interrupted prepare left is of another request or source: starting anew"
            )
        kept = {record.name for split in SPLITS for record in journal.shards[split]}
        for path_there in shards.iterdir():
            if path_there.name not in kept:
                path_there.unlink()
        commit.write_atomically(path, "".join(map(_line, [request, *journal._entries()])))
        return journal

    @property
    def tokens(self) -> int:
        """Tokens in finished shards."""
        return sum(record.tokens for split in SPLITS for record in self.shards[split])

    def set_counts(self, counts: list[int], layout: str) -> None:
        """Record how many documents each partition of a layout holds."""
        self.counts, self.layout = counts, layout
        self._append({"counts": counts, "layout": layout})

    def add_shard(self, record: ShardRecord) -> None:
        """Record a shard, which must be durable."""
        self.shards[_split_of(record)].append(record)
        self._append({"shard": record.model_dump(mode="json")})

    def _append(self, entry: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())

    def _entries(self) -> list[dict[str, Any]]:
        counts = [{"counts": self.counts, "layout": self.layout}] if self.layout else []
        records = [record for split in SPLITS for record in self.shards[split]]
        return counts + [{"shard": record.model_dump(mode="json")} for record in records]

    def _believe(
        self, entries: list[dict[str, Any]], folder: Path, on_note: Callable[[str], None]
    ) -> None:
        """Take in the entries; of each split, the shards before the first that is not as recorded."""
        damaged = set()
        for entry in entries:
            if "counts" in entry:
                self.counts, self.layout = entry["counts"], entry["layout"]
                continue
            record = ShardRecord.model_validate(entry["shard"])
            split = _split_of(record)
            problem = _problem(folder, record)
            if split not in damaged and problem:
                damaged.add(split)
                on_note(f"{problem}: going on from before it")
            if split not in damaged and record.name == shard_name(split, len(self.shards[split])):
                self.shards[split].append(record)


def _split_of(record: ShardRecord) -> str:
    return record.name.partition("-")[0]


def _problem(folder: Path, record: ShardRecord) -> str | None:
    problem = shard_problem(folder, record)
    if problem is None and integrity.sha256_of(folder / record.name) != record.sha256:
        problem = f"{folder / record.name} has another SHA-256 than when it was written"
    return problem


# --- lines -------------------------------------------------------------------------------------


def _line(entry: dict[str, Any]) -> str:
    return json.dumps({"entry": entry, "sha256": _hash(entry)}, sort_keys=True) + "\n"


def _hash(entry: object) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> list[dict[str, Any]]:
    """The entries up to the first line that is torn or damaged."""
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
