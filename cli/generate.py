"""`llmtrain generate`: text from what was trained, as it is written.

llmtrain generate runs/demo --prompt "My fellow Americans"
"""

import signal
import sys
import unicodedata
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from .common import WeightsArgument, console, discard_stdout, err_console, interruptible, print_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llmtrain.checkpoints.resolve import Target
    from llmtrain.evaluation.generation import Sampling
    from llmtrain.runtime.signals import Interrupt

    Write = Callable[["Sampling"], Iterator[str]]
    """The text after the prompt, in pieces."""

_CHOICE = "Choosing tokens"


def generate(
    target: WeightsArgument = None,
    prompt: Annotated[
        str, typer.Option(help="Where the text begins.", show_default="a new document")
    ] = "",
    max_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 256,
    num: Annotated[
        int, typer.Option(min=1, help="Texts; each has a seed of its own: --seed, and on.")
    ] = 1,
    compare: Annotated[
        bool, typer.Option("--compare", help="Raw weights and their average, side by side.")
    ] = False,
    temperature: Annotated[
        float,
        typer.Option(
            help="Divides the logits; 0 takes the likeliest token always.", rich_help_panel=_CHOICE
        ),
    ] = 0.8,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Choose among so many of the likeliest.",
            show_default="all",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Choose among the fewest whose probabilities add up to this.",
            show_default="all",
            rich_help_panel=_CHOICE,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the random choices.", rich_help_panel=_CHOICE)
    ] = 1337,
    tokenizer: Annotated[
        str | None, typer.Option(help="gpt2 or byte.", show_default="as config.json tells")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> None:
    """Write text with a model: the prompt and what follows it, until the model ends the text.

    Weights are float32. A text longer than the model's block size goes on with the newer half of it in sight.
    """
    from llmtrain.errors import UserError
    from llmtrain.evaluation.generation import Sampling, generate_text, load_generator
    from llmtrain.evaluation.selection import choose_weights
    from llmtrain.model.tokenizer import well_formed

    prompt = well_formed(prompt)  # an argument may hold bytes that are no text
    first = Sampling(max_tokens, temperature, top_k, top_p, seed)
    chances = (replace(first, seed=seed + number) for number in range(num))
    weights, raw = choose_weights(target)
    if compare and raw is None:
        raise UserError(
            f"{weights.path} is no average with the raw weights of its step beside it",
            hint="llmtrain average makes one; --compare takes a run that has one, or the average in its run",
        )
    writers: dict[Target, Write] = {}
    for each in [raw, weights] if compare and raw is not None else [weights]:
        err_console.print(f"{each.label}: {each.path}", markup=False, style="dim", soft_wrap=True)
        writers[each] = partial(
            generate_text, *load_generator(each.path, tokenizer=tokenizer, device=device), prompt
        )
    with interruptible("the text ends here") as interrupt, _reader_may_leave():

        def written(each: "Target", chance: "Sampling") -> "Iterator[str]":
            return _until(interrupt, writers[each](chance))

        if as_json:
            print_json(
                [
                    _document(prompt, each, c, "".join(written(each, c)))
                    for c in chances
                    for each in writers
                ]
            )
            return
        for number, chance in enumerate(chances):
            if compare:
                console.print(
                    _columns(
                        {each.label: prompt + "".join(written(each, chance)) for each in writers}
                    )
                )
            else:
                _stream(prompt, written(weights, chance), first=number == 0)


def _until(interrupt: "Interrupt", pieces: "Iterator[str]") -> "Iterator[str]":
    """The pieces, as far as they come before a signal does."""
    for piece in pieces:
        yield piece
        interrupt.check()


def _stream(prompt: str, pieces: "Iterator[str]", *, first: bool) -> None:
    """Print a text as it comes; between two texts, a line of dashes."""
    sys.stdout.write(visible(prompt) if first else f"---\n{visible(prompt)}")
    try:
        for piece in pieces:
            sys.stdout.write(visible(piece))
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")


def visible(text: str) -> str:
    """Text with U+FFFD for control characters: a model may write what a terminal would obey."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def _columns(texts: dict[str, str]) -> Table:
    table = Table(*(Column(escape(label), ratio=1) for label in texts), expand=True)
    table.add_row(*(escape(visible(text)) for text in texts.values()))
    return table


def _document(prompt: str, weights: "Target", chance: "Sampling", text: str) -> dict[str, object]:
    return {
        "label": weights.label,
        "step": weights.step,
        "path": str(weights.path),
        "seed": chance.seed,
        "prompt": prompt,
        "text": text,
    }


@contextmanager
def _reader_may_leave() -> "Iterator[None]":
    """A pipe that is closed at its other end is a reason to stop, not an error."""
    try:
        yield
    except BrokenPipeError:
        discard_stdout()
        raise typer.Exit(128 + signal.SIGPIPE) from None
