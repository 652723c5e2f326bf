"""Run the command benchmarks one after the other (half an hour on two cores) and print one table.

Unmeasured rows are listed too, because a missing row would read like a claim.

    everything(json=Path("figures"))
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from llmtrain.errors import UserError

from . import average, capacity, evaluate, prepare, profile, snapshot, startup, train
from .measure import Row, not_measured, require_cuda, show, write


def everything(
    source: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Documents for prepare: .jsonl (.gz, .zst).",
            show_default="Python's own library",
        ),
    ] = None,
    checkout: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="A checkout with nanoGPT's model.py to compare with.",
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Measured rounds.", show_default="3 to 11")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write a file of figures for each command there."),
    ] = None,
) -> None:
    """Measure everything except `attention` and `head`; list unmeasurable rows with the reason."""
    if json is not None:
        json.mkdir(parents=True, exist_ok=True)
    found = []
    for name, sides in _benches(source, checkout, rounds).items():
        rows = [row for measure in sides for row in _tried(name, measure)]
        found += rows
        show(rows)
        if json is not None:
            write(rows, json / f"{name}.json")
    show(found)


def _benches(
    source: Path | None, checkout: Path | None, times: int | None
) -> dict[str, list[Callable[[], list[Row]]]]:
    """Return the measurements by command."""
    others = [
        "plain",
        *(["transformers"] if find_spec("transformers") else []),
        *map(str, filter(None, [checkout])),
    ]
    # The denominator comes first: nanoGPT's loop on a GPU, if given.
    rivals = [*map(str, filter(None, [checkout])), "plain"] if require_cuda() is None else ["plain"]
    training = partial(train.measure, batch=None, settings=[])
    larger = () if require_cuda() else ("gpt2-medium", "gpt2-large")
    return {
        "startup": [partial(startup.measure, rounds=times or 11)],
        "average": [
            partial(average.measure, "last", "plain", rounds=times or 5),
            partial(average.measure, "all", "plain", rounds=times or 3),
        ],
        "eval": [partial(evaluate.measure, "6x384", rounds=times or 5)],
        "snapshot": [partial(snapshot.measure, rounds=times or 5)],
        "prepare": [partial(prepare.measure, source, "plain", rounds=times or 3)],
        "train": [
            partial(training, others, "6x384", steps=3, rounds=times or 5),
            partial(training, rivals, "gpt2-small", steps=1, rounds=times or 3),
            *(partial(training, rivals, model, steps=3, rounds=times or 5) for model in larger),
            partial(capacity.measure, "gpt2-small"),
            partial(_not_measured_of_training, checkout),
        ],
        "profile": [partial(profile.measure, "6x384", rounds=times or 5, settings=[])],
    }  # fmt: skip


def _not_measured_of_training(checkout: Path | None) -> list[Row]:
    missing = []
    if find_spec("transformers") is None:
        missing.append(not_measured("train 6x384", "transformers", "it is not installed"))
    if checkout is None:
        missing.append(not_measured("train 6x384", "nanoGPT", "no --checkout DIR"))
    if reason := require_cuda():
        models = ("gpt2-small", "gpt2-medium", "gpt2-large")
        missing += [not_measured(f"train {model} on a GPU", train.OURS, reason) for model in models]
    return missing


def _tried(name: str, measure: Callable[[], list[Row]]) -> list[Row]:
    """Return the rows, or an unmeasured row with the error of a failed side."""
    try:
        return measure()
    except (UserError, RuntimeError, OSError) as error:
        return [not_measured(name, "", str(error).strip())]
