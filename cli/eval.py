"""`llmtrain eval`: compare raw and averaged weights by loss, on a text, or on zero-shot tasks."""

import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.table import Column, Table

from llmtrain.errors import UserError
from llmtrain.evaluation.options import EvalOptions, TaskOptions

from .common import JsonFlag, ProgressLine, console, help_of, interruptible, print_json, warn

if TYPE_CHECKING:
    from llmtrain.checkpoints.resolve import Target
    from llmtrain.evaluation.results import EvalResult, Progress, TaskResult
    from llmtrain.evaluation.text import TextResult


def _option(options: type, field: str, *names: str, default: str | bool = True, **rest: Any) -> Any:
    """Return an option with the help text of a field."""
    return typer.Option(*names, help=help_of(options, field), show_default=default, **rest)


_loss = partial(_option, EvalOptions)
_task = partial(_option, TaskOptions, rich_help_panel="Zero-shot tasks (extra: eval)")
_TEXT: Any = {"rich_help_panel": "Text file"}


_DISCARDED = " (discarded inputs)"


@dataclass(frozen=True)
class Measured:
    """Everything measured for one set of weights."""

    target: "Target"
    loss: "EvalResult | None"
    text: "TextResult | None"
    tasks: "list[TaskResult]"
    discarded: bool
    """True for an average of snapshots that the run discarded in a rewind."""


def evaluate(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TARGET",
            help="Runs, folders of weights, or OWNER/NAME[@REVISION] on the hub.",
            show_default="the newest run under runs/",
        ),
    ] = None,
    data: Annotated[Path | None, _loss("data", default="the run's data.path")] = None,
    split: Annotated[Literal["val", "train"], _loss("split")] = "val",
    tokens: Annotated[
        int | None, _loss("tokens", min=2, default="the run's eval.tokens, else all")
    ] = None,
    batch: Annotated[int | None, _loss("batch", min=1, default="the run's eval.batch")] = None,
    device: Annotated[str, _loss("device")] = "auto",
    every_snapshot: Annotated[
        bool, typer.Option("--all", help="Evaluate every snapshot, not only those with an average.")
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(help="Measure loss and perplexity on this text.", show_default=False, **_TEXT),
    ] = None,
    stride: Annotated[
        int | None, _loss("stride", min=1, default="disjoint windows", **_TEXT)
    ] = None,
    tasks: Annotated[str | None, _task("tasks", default=False)] = None,
    limit: Annotated[int | None, _task("limit", min=1, default="all")] = None,
    batch_size: Annotated[str, _task("batch")] = "auto",
    task_data: Annotated[Path | None, _task("data", default="data sets on the hub")] = None,
    task_files: Annotated[Path | None, _task("files", default=False)] = None,
    trust_task_files: Annotated[bool, _task("trust_files", "--trust-task-files")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Evaluate weights: loss (nats per token), perplexity, bits per byte, difference from raw.

    A run stands for its averages and the raw snapshots of the same steps. The split is read in
    disjoint windows of the model's block size; each token but the first is predicted once. Results
    are cached under the run's evals/ by the content of weights and data. --text and --tasks add
    their measures to the table, with standard errors if available.
    """
    from llmtrain.checkpoints.resolve import find_targets

    number = _parse_batch_size(batch_size)
    _require_companions("--text", text, {"--stride": stride})
    _require_companions("--task-files", task_files, {"--trust-task-files": trust_task_files})
    task_settings = {"--limit": limit, "--task-data": task_data, "--task-files": task_files}
    _require_companions("--tasks", tasks, task_settings | {"--batch-size": number != "auto"})
    task_options = None
    if tasks is not None:
        task_options = TaskOptions(
            _parse_tasks(tasks), limit, number, task_data, task_files, trust_task_files, device
        )
    options = EvalOptions(data, split, tokens, batch, device=device, stride=stride)
    names: list[str | None] = [*targets] if targets else [None]
    # Two averages of a step share their raw weights: measure and show those once.
    found = {
        target.path.resolve(): target
        for name in names
        for target in find_targets(name, every_snapshot=every_snapshot)
    }
    weights = list(found.values())
    outcome = "run the same command again to continue from the cached results"
    with (
        interruptible(outcome) as interrupt,
        ProgressLine("evaluating") as line,
        redirect_stdout(sys.stderr),  # lm-eval prints to standard output
    ):

        def progress(target: "Target", measure: str, done: int, total: int) -> None:
            interrupt.check()
            detail = f"{target.path} {measure} {done / max(total, 1):.0%}"
            line.update(weights.index(target), len(weights), detail)

        losses = _losses(weights, options, progress, needed=text is None and tasks is None)
        texts: list[TextResult | None] = [None] * len(weights)
        if text is not None:
            from llmtrain.evaluation.text import measure_text

            texts = [*measure_text(weights, text, options, progress, warn=warn)]
        scores: list[list[TaskResult]] = [[]] * len(weights)
        if task_options is not None:
            from llmtrain.evaluation.tasks import measure_tasks

            scores = measure_tasks(weights, task_options, progress, warn=warn)
    from llmtrain.evaluation.weights import discarded_inputs

    discarded = [bool(discarded_inputs(target.path, target.run)) for target in weights]
    measured = list(map(Measured, weights, losses, texts, scores, discarded))
    if any(discarded):
        path = weights[discarded.index(True)].path
        warn(
            f"{sum(discarded)} average(s) of discarded snapshots, such as {path}, are not compared "
            "with raw weights: delete these averages and run llmtrain average again"
        )
    if as_json:
        print_json([_as_json(each) for each in measured])
    elif text is None and tasks is None:
        console.print(loss_table([loss for loss in losses if loss is not None]))
    else:
        console.print(_measures_table(measured))
        for note in dict.fromkeys(note for each in measured for note in _conditions(each)):
            console.print(note)


def _require_companions(option: str, value: object, dependents: dict[str, object]) -> None:
    for name, given in dependents.items():
        if given and value is None:
            raise UserError(f"{name} requires {option}", hint="see llmtrain eval --help")


def _parse_batch_size(text: str) -> Any:
    if text == "auto":
        return text
    if not re.fullmatch("[1-9][0-9]{0,17}", text):
        raise UserError(
            f"--batch-size {text!r:.50} is neither auto nor a number of at least 1",
            hint="use --batch-size 8",
        )
    return int(text)


def _parse_tasks(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if not all(names):
        raise UserError(
            f"--tasks {text!r:.200} contains an empty name", hint="write --tasks piqa,sciq"
        )
    return names


def _losses(
    targets: "list[Target]", options: EvalOptions, progress: "Progress", *, needed: bool
) -> "list[EvalResult | None]":
    """Measure losses on token shards; unless `needed`, skip weights without data."""
    from llmtrain.evaluation.loss import has_data, measure_losses

    known = [target for target in targets if needed or has_data(target, options)]
    if any(target.run and target not in known for target in targets):
        warn("the training data of the run was not found: pass --data FOLDER to measure losses")
    losses = measure_losses(known, options, progress, warn=warn)
    by_path = dict(zip((target.path for target in known), losses, strict=True))
    return [by_path.get(target.path) for target in targets]


def _as_json(measured: Measured) -> dict[str, Any]:
    """Return one object of `--json`; without data, the fields of the loss are null."""
    from llmtrain.evaluation.results import EvalResult

    target = measured.target
    document = dict.fromkeys(EvalResult.__dataclass_fields__) | {
        "label": target.label,
        "step": target.step,
        "path": str(target.path),
        "run": target.run.path.resolve().name if target.run else None,
        "discarded": measured.discarded,
    }
    document |= asdict(measured.loss) if measured.loss else {}
    if measured.text is not None:
        document["text"] = asdict(measured.text)
    if measured.tasks:
        document["tasks"] = [asdict(result) for result in measured.tasks]
    return document


def loss_table(results: "list[EvalResult]") -> Table:
    """Return a table with a line per set of weights, and the run if there are several."""
    several = len({result.run for result in results}) > 1
    names = ("step", "loss", "±", "perplexity", "bits/byte", "minus raw", "tokens", "s")
    columns = [Column(name, justify="right", no_wrap=True) for name in names]
    table = Table(Column("weights", no_wrap=True), *columns, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for each in results:
        table.add_row(
            (f"{each.run}: {each.label}" if several and each.run else each.label)
            + _DISCARDED * each.discarded,
            "" if each.step is None else f"{each.step:,}",
            f"{each.loss:.4f}",
            "n/a" if each.stderr is None else f"{each.stderr:.4f}",
            "inf" if each.perplexity is None else _format(each.perplexity, 3),
            "n/a" if each.bits_per_byte is None else f"{each.bits_per_byte:.4f}",
            "n/a" if each.delta is None else f"{each.delta:+.4f}",
            f"{each.tokens:,}",
            f"{each.seconds:.1f}",
        )
    return table


def _measures_table(measured: list[Measured]) -> Table:
    """Return a table with a line per measure and set of weights, grouped by measure."""
    several = len({_place(each.target)[0] for each in measured}) > 1
    names = ("step", "value", "±", "minus raw")
    columns = [Column(name, justify="right", no_wrap=True) for name in names]
    first = (Column("measure", overflow="fold"), Column("weights", overflow="fold"))
    table = Table(*first, *columns, box=box.SIMPLE, padding=(0, 1, 0, 0))
    groups: dict[str, list[tuple[Target, float | None, float | None, bool]]] = {}
    for each in measured:
        for name, value, stderr in _values(each):
            groups.setdefault(name, []).append((each.target, value, stderr, each.discarded))
    for name, lines in groups.items():
        raw = {_place(target): value for target, value, *_ in lines if target.label == "raw"}
        for i, (target, value, stderr, discarded) in enumerate(lines):
            run, step = _place(target)
            base = None if discarded else raw.get((run, step))
            difference = "n/a" if value is None or base is None else _format(value - base, 4, "+")
            table.add_row(
                name if i == 0 else "",
                (f"{run.name}: {target.label}" if several and target.run else target.label)
                + _DISCARDED * discarded,
                "" if step is None else f"{step:,}",
                "inf" if value is None else _format(value, 4),
                "" if stderr is None else _format(stderr, 4),
                "" if target.label == "raw" else difference,
                end_section=i == len(lines) - 1,
            )
    return table


def _place(target: "Target") -> tuple[Path, int | None]:
    """Return the run, or the folder outside a run, and the step."""
    return (target.run.path if target.run else target.path).resolve(), target.step


def _values(measured: Measured) -> "Iterator[tuple[str, float | None, float | None]]":
    """Yield name, value (None if it overflows) and standard error of each measure."""
    if loss := measured.loss:
        yield f"{loss.split}: loss", loss.loss, loss.stderr
        yield f"{loss.split}: bits/byte", loss.bits_per_byte, None
    if text := measured.text:
        name = text.file.rpartition("/")[2]
        yield f"{name}: loss", text.loss, text.stderr
        yield f"{name}: word perplexity", text.word_perplexity, None
        yield f"{name}: byte perplexity", text.byte_perplexity, None
    for score in (score for result in measured.tasks for score in result.scores):
        arrow = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
        yield f"{score.task}: {score.metric}{arrow}", score.value, score.stderr


def _conditions(measured: Measured) -> "Iterator[str]":
    """Yield a line for the text and for each task: size, windows and context."""
    if text := measured.text:
        strided = "" if text.windows == "disjoint" else f" by {text.stride:,}:"
        yield (
            f"{text.file}: {text.tokens:,} tokens, {text.words:,} words, {text.bytes:,} bytes; "
            f"{text.windows}{strided} windows of {text.context:,} tokens, {text.precision}"
        )
    for task in measured.tasks:
        documents = sum({score.task: score.documents or 0 for score in task.scores}.values())
        first = "the first " if task.limit else ""
        cut = f"; {task.truncated:.0%} of the requests were truncated" if task.truncated else ""
        yield (
            f"{task.task}: {first}{documents:,} documents from {task.source}, "
            f"context of {task.context:,} tokens{cut}"
        )


def _format(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" if abs(value) < 1e5 else f"{value:{sign}.3e}"
