"""`llmtrain generate`: print text as it is generated."""

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from llmtrain.errors import UserError
from llmtrain.evaluation.options import EvalOptions, Sampling

from .common import (
    JsonFlag,
    WeightsArgument,
    console,
    help_of,
    interruptible,
    print_json,
    print_selection,
    print_text,
)

if TYPE_CHECKING:
    from llmtrain.checkpoints.resolve import Target

_OVERRIDES = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that change the order in which a terminal shows the following ones."""
_help = partial(help_of, Sampling)
_option = partial(typer.Option, rich_help_panel="Sampling")


def generate(
    target: WeightsArgument = None,
    prompt: Annotated[
        str, typer.Option(help="Start of the text.", show_default="a new document")
    ] = "",
    max_tokens: Annotated[int, typer.Option(help=_help("max_tokens"))] = 256,
    num: Annotated[
        int, typer.Option(min=1, help="Number of texts, with seeds --seed, --seed + 1, ….")
    ] = 1,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show raw weights and their average side by side.")
    ] = False,
    temperature: Annotated[float, _option(help=_help("temperature"))] = 0.8,
    top_k: Annotated[int | None, _option(help=_help("top_k"), show_default="all")] = None,
    top_p: Annotated[float | None, _option(help=_help("top_p"), show_default="all")] = None,
    seed: Annotated[int, _option(min=0, help=_help("seed"))] = 1337,
    tokenizer: Annotated[
        str | None, typer.Option(help="gpt2 or byte.", show_default="from config.json")
    ] = None,
    device: Annotated[str, typer.Option(help=help_of(EvalOptions, "device"))] = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Generate text: the prompt and its continuation, up to the end-of-text token.

    Weights are float32. Beyond the model's block size, only the most recent half of the context is
    kept.
    """
    from llmtrain.evaluation.generation import generate_text, load_generator
    from llmtrain.evaluation.selection import choose_weights
    from llmtrain.model.tokenizer import well_formed

    prompt = well_formed(prompt)  # an argument may contain invalid bytes
    first = Sampling(max_tokens, temperature, top_k, top_p, seed)
    chosen = choose_weights(target)
    weights, pair = chosen.weights, (chosen.raw, chosen.average)
    if compare and None in pair:
        problem = f"{weights.path} is not an average with raw weights of the same step"
        raise UserError(problem, hint="pass a run with averages, or an average inside its run")
    generators: dict[Target, Callable[[Sampling], Iterator[str]]] = {}
    for each in filter(None, pair) if compare else [weights]:
        print_selection(each.label, each.path, chosen.reason if each == weights else "")
        loaded = load_generator(each.path, tokenizer=tokenizer, device=device)
        generators[each] = partial(generate_text, *loaded, prompt)
    documents = []
    with interruptible("the text ends here") as interrupt:

        def stream(each: "Target", sampling: Sampling) -> Iterator[str]:
            for part in generators[each](sampling):
                yield part
                interrupt.check()

        for number in range(num):
            sampling = replace(first, seed=seed + number)
            if not as_json and not compare:
                _print_stream(prompt, stream(weights, sampling), first=number == 0)
                continue
            texts = {each: "".join(stream(each, sampling)) for each in generators}
            if as_json:
                for each, text in texts.items():
                    place = {"label": each.label, "step": each.step, "path": str(each.path)}
                    document = place | {"seed": sampling.seed, "prompt": prompt, "text": text}
                    documents.append(document)
            else:
                columns = [Column(each.label, ratio=1) for each in texts]
                table = Table(*columns, expand=True)
                table.add_row(*(Text(visible(prompt + text)) for text in texts.values()))
                console.print(table)
    if as_json:
        print_json(documents)


def _print_stream(prompt: str, parts: Iterator[str], *, first: bool) -> None:
    """Print a text as it is generated, after a separator line unless it is the first."""
    print_text(visible(prompt) if first else f"---\n{visible(prompt)}", end="")
    try:
        for part in parts:
            print_text(visible(part), end="")
    finally:
        print_text("")


def visible(text: str) -> str:
    """Replace control characters and bidirectional overrides with U+FFFD, except line breaks."""
    return "".join("\ufffd" if _is_control(char) else char for char in text)


def _is_control(char: str) -> bool:
    is_break = char in "\n\t"
    return not is_break and (unicodedata.category(char) in ("Cc", "Cs") or char in _OVERRIDES)
