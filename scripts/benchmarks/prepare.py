"""`llmtrain prepare` as a whole command: a file's documents to GPT-2 tokens, and half of them.

The lower bound is tiktoken alone on documents in memory. Half of the documents show whether memory
grows with the corpus.

    publish(measure(Path("texts.jsonl.zst"), "plain", rounds=3), None)
"""

import json as json_format
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from llmtrain.data.manifest import read_manifest
from llmtrain.data.readers import partitions_of, read_partition
from llmtrain.data.shards import TOKEN_BYTES
from llmtrain.data.sources import find_files

from .commands import LLMTRAIN, run
from .measure import Figures, Row, Side, Worker, publish, rows, take_turns
from .plain_prepare import PROCESSES, encoding

OURS, HALF, FLOOR, PLAIN = "llmtrain", "llmtrain, half", "tiktoken alone", "plain"
TARGETS = {"webmix-train": {(OURS, "s"): "≤ 6", (OURS, "MB"): "≤ 1000, flat"}}
"""Targets by corpus; webmix-train has 43,497 web pages, 128 MB."""
BATCH = 1000
"""Documents per tiktoken call: tokens as Python integers take 36 bytes each."""


def prepare(
    source: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Documents: .jsonl (.gz, .zst) with the field text.",
            show_default="Python's standard library",
        ),
    ] = None,
    against: Annotated[
        Literal["plain"] | None,
        typer.Option(
            help="plain: nanoGPT's preparation, datasets.map with tiktoken, then a memmap."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 5,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
) -> None:
    """Measure `llmtrain prepare` with GPT-2's tokenizer."""
    publish(measure(source, against, rounds=rounds), json)


def measure(source: Path | None, against: str | None, *, rounds: int) -> list[Row]:
    """Return the rows of one corpus; None: Python's standard library, one module per document."""
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as name:
        folder = Path(name)
        path = _library(folder / "python-library.jsonl") if source is None else source.absolute()
        count = sum(1 for _ in _documents(path))
        sides: dict[str, Side] = {
            OURS: partial(_llmtrain, path, folder / "tokens"),
            HALF: partial(_llmtrain, path, folder / "tokens", "--limit-documents", str(count // 2)),
            FLOOR: Worker(_tiktoken, path),
        }
        if against is not None:
            sides[PLAIN] = partial(_plain, path, folder / "plain")
        taken = take_turns(sides, rounds)
    corpus = path.name.partition(".")[0]
    return rows(
        f"prepare {corpus}, {count:,} documents", taken, against or FLOOR, TARGETS.get(corpus, {})
    )


def _library(path: Path) -> Path:
    """Write about 30 MB of text that every machine has."""
    with path.open("w", encoding="utf-8") as lines:
        for module in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            if "site-packages" not in module.parts:
                text = module.read_text(encoding="utf-8", errors="replace")
                lines.write(json_format.dumps({"text": text}) + "\n")
    return path


def _documents(path: Path) -> Iterator[str]:
    paths, _ = find_files(str(path))
    for partition in partitions_of(map(str, paths)):
        for document in read_partition(partition, "text"):
            yield str(document, "utf-8")


def _llmtrain(source: Path, out: Path, *options: str) -> Figures:
    figures = run(
        [LLMTRAIN, "prepare", str(source), "--out", str(out), *options], out.parent, tree=True
    )
    manifest = read_manifest(out)
    shutil.rmtree(out)
    return _figures(figures, manifest.train.tokens + manifest.val.tokens)


def _plain(source: Path, out: Path) -> Figures:
    out.mkdir()
    script = Path(__file__).with_name("plain_prepare.py")
    figures = run([sys.executable, str(script), str(source), str(out)], out, tree=True)
    written = sum(path.stat().st_size for path in out.glob("*.bin"))
    shutil.rmtree(out)
    return _figures(figures, written // TOKEN_BYTES)


def _figures(measured: Figures, tokens: int) -> Figures:
    return {"s": measured["s"], "MB": measured["MB"], "tokens/s": tokens / measured["s"]}


def _tiktoken(source: Path) -> Side:
    """Build a side that encodes documents in memory, without reading or writing."""
    texts, enc = list(_documents(source)), encoding()

    def once() -> Figures:
        started, tokens = time.perf_counter(), 0
        for first in range(0, len(texts), BATCH):
            batch = enc.encode_ordinary_batch(texts[first : first + BATCH], num_threads=PROCESSES)
            tokens += sum(len(ids) + 1 for ids in batch)
        seconds = time.perf_counter() - started
        return {"s": seconds, "tokens/s": tokens / seconds}

    return once
