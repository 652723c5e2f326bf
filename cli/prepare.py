"""`llmtrain prepare`: text to token shards.

llmtrain prepare
llmtrain prepare corpus/ --tokenizer byte --val-fraction 0.01
"""

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .common import ProgressLine, console, err_console, interruptible, print_json, warn

if TYPE_CHECKING:
    from llmtrain.data.build import PrepareProgress
    from llmtrain.data.manifest import Manifest


class TokenizerName(StrEnum):
    """The tokenizers that ship with the package."""

    GPT2 = "gpt2"
    BYTE = "byte"


class EngineName(StrEnum):
    """Where the tokenizing is done."""

    LOCAL = "local"
    RAY = "ray"


def parse_count(value: str | int) -> int:
    """A whole number as people write it: 100M, 1_000, 2.5e6, 10k, 1B. An int is itself (a default)."""
    text = str(value).strip()
    scale = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}.get(text[-1:].lower(), 1)
    digits = text[:-1] if scale > 1 else text
    try:
        number = int(digits) * scale
    except ValueError:
        try:
            fraction = float(digits) * scale
            number = round(fraction)
        except (ValueError, OverflowError):
            raise typer.BadParameter(
                f"{text!r} is not a number such as 100M, 1_000 or 2.5e6"
            ) from None
        if number != fraction:
            raise typer.BadParameter(f"{text!r} is not a whole number") from None
    return number


def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="openwebtext, hub:NAME[:CONFIG], sotu, or local files: a .txt (one document), .jsonl, "
            ".jsonl.gz, .jsonl.zst or .parquet file, a folder of them, or a glob in quotes; or a URL of one "
            "(s3://, gs://, hf://)."
        ),
    ] = "openwebtext",
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder or URL for the shards.",
            show_default="data/ and the source's name",
        ),
    ] = None,
    tokenizer: Annotated[
        TokenizerName, typer.Option(help="GPT-2's BPE (50,257 ids) or bytes (257 ids).")
    ] = TokenizerName.GPT2,
    val_fraction: Annotated[
        float, typer.Option(help="Share of documents held out for validation; 0 for none.")
    ] = 0.0005,
    seed: Annotated[int, typer.Option(help="Which documents are held out.")] = 2357,
    shard_tokens: Annotated[
        int,
        typer.Option(
            parser=parse_count,
            metavar="COUNT",
            help="Tokens in a shard; it ends with the document that reaches them.",
            show_default="100M",
        ),
    ] = 100_000_000,
    workers: Annotated[
        int | None,
        typer.Option(help="Threads that tokenize; the output is the same.", show_default="cores"),
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(help="Threads here, or a Ray cluster; the output is the same.")
    ] = EngineName.LOCAL,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="The cluster: HOST:PORT, or auto for the one that runs here.",
            show_default="RAY_ADDRESS, else one is started",
        ),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    limit_documents: Annotated[
        int | None,
        typer.Option(
            parser=parse_count,
            metavar="COUNT",
            help="Only the first so many documents.",
            show_default="all",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the manifest as JSON and nothing else.")
    ] = False,
) -> None:
    """Turn documents into token shards that pretrain and eval read.

    Documents keep their order and are each followed by an end-of-text token; those held out are
    chosen as datasets' train_test_split does. The folder appears when it is complete; interrupted
    or killed, the same command goes on after the last finished shard.
    """
    from llmtrain.data.prepare import prepare as run
    from llmtrain.data.prepare import published_difference
    from llmtrain.data.sources import default_name

    folder = out or str(Path("data") / default_name(source))
    _quiet_unless_terminal()
    started = time.monotonic()
    unfinished = f"{folder} is not complete; the same command goes on after its last finished shard"
    with interruptible(unfinished) as interrupt, ProgressLine("documents") as line:
        rate = _Rate(line)

        def on_progress(progress: "PrepareProgress") -> None:
            interrupt.check()
            rate.show(progress)

        manifest = run(
            source,
            folder,
            tokenizer=tokenizer.value,
            val_fraction=val_fraction,
            seed=seed,
            shard_tokens=shard_tokens,
            workers=workers,
            engine=engine.value,
            ray_address=ray_address,
            text_field=text_field,
            limit_documents=limit_documents,
            on_progress=on_progress,
            on_note=lambda note: err_console.print(escape(note)),
        )
    seconds = time.monotonic() - started
    difference = published_difference(manifest)
    if difference:
        warn(difference)
    if as_json:
        print_json(manifest.document())
    else:
        _print_summary(folder, manifest, seconds)


class _Rate:
    """Progress with tokens, speed and time left; the clock starts with the first piece of text."""

    def __init__(self, line: ProgressLine) -> None:
        self._line = line
        self._started = 0.0
        self._before = (0, 0)

    def show(self, progress: "PrepareProgress") -> None:
        now = time.monotonic()
        if progress.total_documents is None:
            self._line.update(progress.documents, None, "read")
            return
        if not self._started:
            self._started, self._before = now, (progress.documents, progress.text_bytes)
        elapsed = max(now - self._started, 1e-9)
        documents, text_bytes = self._before
        rate = (progress.text_bytes - text_bytes) / elapsed
        detail = f"{progress.tokens / 1e6:,.1f}M tokens, {rate / 1e6:.1f} MB/s"
        # On a terminal the bar has a column for the time left.
        if progress.documents > documents and not err_console.is_terminal:
            left = (progress.total_documents - progress.documents) / (
                progress.documents - documents
            )
            detail += f", {elapsed * left:,.0f} s left"
        self._line.update(progress.documents, progress.total_documents, detail)


def _quiet_unless_terminal() -> None:
    # The two libraries draw bars of their own for downloads; a pipe gets none of their noise.
    if err_console.is_terminal:
        return
    import datasets
    from huggingface_hub.utils.tqdm import disable_progress_bars

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    disable_progress_bars()


def _print_summary(folder: str, manifest: "Manifest", seconds: float) -> None:
    table = Table("split")
    for name in ("documents", "text (MB)", "tokens", "bytes/token", "shards"):
        table.add_column(name, justify="right")
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
        console.print("The val split is empty (val fraction 0): there is nothing to evaluate on.")
    console.print(escape(f"{manifest.tokenizer.name} tokens in {folder}, {seconds:.1f} s"))
