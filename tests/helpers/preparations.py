"""Prepare data in tests: options as keywords, a source of three files, and kept shards.

assert identity(staging / "shards").items() <= identity(out).items()
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtrain.data import prepare as library
from llmtrain.data.manifest import Manifest
from llmtrain.data.options import PrepareOptions
from llmtrain.data.staging import JOURNAL_FILE

OPTIONS = {"tokenizer": "byte", "val_fraction": 0.3, "shard_tokens": 20_000}
ARGUMENTS = ("--tokenizer", "byte", "--val-fraction", "0.3", "--shard-tokens", "20k")
COMMAND = Path(sys.executable).parent / "llmtrain"


def prepare(
    source: Path | str,
    out: Path | str,
    *,
    on_progress: Callable[[library.PrepareProgress], None] = lambda progress: None,
    log: Callable[[str], None] = lambda message: None,
    **options: Any,
) -> Manifest:
    """Prepare `source` with options given as keywords."""
    return library.prepare(
        str(source), out, PrepareOptions(**options), on_progress=on_progress, log=log
    )


def write_source(folder: Path, seed: int = 0) -> Path:
    """Write 3,000 documents, about a megabyte, as three files of two kinds."""
    chance = random.Random(seed)
    texts = ["word é " * chance.randrange(100) for _ in range(3000)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "web").mkdir()
    (folder / "web" / "a.jsonl").write_text("".join(lines[:1500]))
    (folder / "web" / "b.txt").write_text(texts[1500])
    (folder / "web" / "c.jsonl").write_text("".join(lines[1501:]))
    return folder / "web"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def identity(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and modification time of each shard, which change if it is written again."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.glob("[!.]*.bin")
    }


def recorded(staging: Path) -> list[str]:
    """Return the names of the shards in the journal's complete lines."""
    lines = (staging / JOURNAL_FILE).read_text().splitlines(keepends=True)
    entries = [json.loads(line)["entry"] for line in lines if line.endswith("\n")]
    return [entry["shard"]["name"] for entry in entries if "shard" in entry]
