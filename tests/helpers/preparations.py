"""What the tests of interrupted preparations share: a source, the command, and whether shards were kept.

assert identity(staging / "shards").items() <= identity(out).items()
"""

import json
import random
import sys
from pathlib import Path

from llmtrain.data.journal import JOURNAL_FILE

OPTIONS = {"tokenizer": "byte", "val_fraction": 0.3, "shard_tokens": 20_000}
ARGUMENTS = ("--tokenizer", "byte", "--val-fraction", "0.3", "--shard-tokens", "20k")
COMMAND = Path(sys.executable).parent / "llmtrain"


def write_source(folder: Path, seed: int = 0) -> Path:
    """3,000 documents in three kinds of files, about a megabyte."""
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
    """Of each shard its inode and when it was last written: they change when it is written again."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.glob("[!.]*.bin")
    }


def recorded(staging: Path) -> list[str]:
    """Names of the shards in the journal's whole lines."""
    lines = (staging / JOURNAL_FILE).read_text().splitlines(keepends=True)
    entries = [json.loads(line)["entry"] for line in lines if line.endswith("\n")]
    return [entry["shard"]["name"] for entry in entries if "shard" in entry]
