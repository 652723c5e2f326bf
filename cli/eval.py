"""`llmtrain eval`: raw and averaged weights side by side, by loss, by a text, by zero-shot tasks.

llmtrain eval runs/demo
"""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import ProgressLine, console, interruptible, print_json, warn
from .eval_table import Measured, explanations, json_of, loss_table, measures_table

if TYPE_CHECKING:
    from llmtrain.checkpoints.resolve import Target
    from llmtrain.evaluation.results import EvalOptions, Row
    from llmtrain.evaluation.tasks import TaskOptions
    from llmtrain.runtime.signals import Interrupt

    from .common import ProgressLine


class Split(StrEnum):
    """Which part of the data."""

    VAL = "val"
    TRAIN = "train"


_TEXT = "Any text"
_TASKS = "Zero-shot tasks (extra: eval)"


def evaluate(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TARGET",
            help="Runs, folders of weights, OWNER/NAME or OWNER/NAME@REVISION on the hub.",
            show_default="the newest run under runs/",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of token shards.", show_default="the run's data.path"),
    ] = None,
    split: Annotated[Split, typer.Option(help="Which split.")] = Split.VAL,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Only the first so many tokens.",
            show_default="the run's eval.tokens, else all",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="Windows in one forward pass.", show_default="the run's eval.batch"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    every_snapshot: Annotated[
        bool,
        typer.Option("--all", help="Every snapshot, not only those whose step has an average."),
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text file: loss, perplexity per word and per byte.",
            show_default=False,
            rich_help_panel=_TEXT,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens that a window predicts; those before them are context.",
            show_default="disjoint windows",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Names for lm-eval, with commas; lambada_openai, hellaswag, piqa, arc_easy, sciq and winogrande "
            "can do without a network.",
            show_default=False,
            rich_help_panel=_TASKS,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Only the first so many documents of a task.",
            show_default="all",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option(
            help="Requests in one forward pass; auto: what the GPU holds, 8 on a CPU.",
            rich_help_panel=_TASKS,
        ),
    ] = "auto",
    task_data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with TASK.jsonl (.zst, .gz) of these six tasks.",
            show_default="data sets on the hub",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    task_files: Annotated[
        Path | None,
        typer.Option(
            help="Folder of lm-eval task files. They are code.",
            show_default=False,
            rich_help_panel=_TASKS,
        ),
    ] = None,
    trust_task_files: Annotated[
        bool,
        typer.Option(
            "--trust-task-files",
            help="Run the code of --task-files: read it first.",
            rich_help_panel=_TASKS,
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> None:
    """Evaluate weights: loss (nats per token), perplexity, bits per byte, difference from raw.

    A run stands for its averages and the raw snapshots of the same steps. The split is read in
    disjoint windows of the model's block size, each token but the first predicted once. Results are
    kept under the run's evals/ and not computed twice for the same weights and data. --text and --tasks
    join the same table, with standard errors where they are known.
    """
    from llmtrain.checkpoints.resolve import find_targets
    from llmtrain.evaluation.results import EvalOptions
    from llmtrain.storage.run_folder import newest_run

    asked = _task_settings(
        tasks, limit, batch_size, task_data, task_files, trust_task_files, device
    )
    _require_companion("--stride", stride, "--text", text)
    # Two averages of one step bring the same raw weights: measure and show them once.
    found = {
        target.path.resolve(): target
        for name in targets or [str(newest_run().path)]
        for target in find_targets(name, every_snapshot=every_snapshot)
    }
    settings = EvalOptions(data=data, split=split.value, tokens=tokens, batch=batch, device=device)
    kept = "the same command goes on from the results that a run keeps"
    with interruptible(kept) as interrupt, ProgressLine("evaluating") as line:
        work = _Work(list(found.values()), interrupt, line)
        everything = work.all_of(settings, text, stride, asked)
    _print(everything, as_json=as_json, losses_only=text is None and asked is None)


class _Work:
    """What is measured of which weights, and how far it is."""

    def __init__(
        self, wanted: "list[Target]", interrupt: "Interrupt", line: "ProgressLine"
    ) -> None:
        self._wanted = wanted
        self._interrupt = interrupt
        self._line = line

    def all_of(
        self,
        settings: "EvalOptions",
        text: Path | None,
        stride: int | None,
        asked: "TaskOptions | None",
    ) -> list[Measured]:
        rows = self._losses(settings, needed=text is None and asked is None)
        everything = [Measured(target, row) for target, row in zip(self._wanted, rows, strict=True)]
        if text is not None:
            from llmtrain.evaluation.text import TextOptions, measure_text

            how = TextOptions(stride=stride, batch=settings.batch or 16, device=settings.device)
            texts = measure_text(self._wanted, text, how, self._progress, warn=warn)
            everything = [replace(one, text=t) for one, t in zip(everything, texts, strict=True)]
        if asked is not None:
            from llmtrain.evaluation.tasks import measure_tasks

            scores = measure_tasks(self._wanted, asked, self._progress, warn=warn)
            everything = [replace(one, tasks=s) for one, s in zip(everything, scores, strict=True)]
        return everything

    def _losses(self, settings: "EvalOptions", *, needed: bool) -> "list[Row | None]":
        """Losses on token shards; without `needed`, only of weights whose data is there."""
        from llmtrain.evaluation.results import data_is_known, measure

        known = [target for target in self._wanted if needed or data_is_known(target, settings)]
        if any(target.run and target not in known for target in self._wanted):
            warn("the data that the run was trained on is not here: no loss on it (--data FOLDER)")
        measured = measure(
            known,
            settings,
            lambda target, *done: self._progress(target, settings.split, *done),
            warn=warn,
        )
        rows = dict(zip((target.path for target in known), measured, strict=True))
        return [rows.get(target.path) for target in self._wanted]

    def _progress(self, target: "Target", what: str, done: int, total: int) -> None:
        self._interrupt.check()
        place = self._wanted.index(target)
        self._line.update(
            place, len(self._wanted), f"{target.path} {what} {done / max(total, 1):.0%}"
        )


def _print(everything: list[Measured], *, as_json: bool, losses_only: bool) -> None:
    if as_json:
        print_json([json_of(one) for one in everything])
    elif losses_only:
        console.print(loss_table([one.row for one in everything if one.row is not None]))
    else:
        console.print(measures_table(everything))
        for line in explanations(everything):
            console.print(line, markup=False)


def _task_settings(
    tasks: str | None,
    limit: int | None,
    batch_size: str,
    data: Path | None,
    files: Path | None,
    trust_files: bool,
    device: str,
) -> "TaskOptions | None":
    """What is asked for; None: no tasks.

    Raises:
        UserError: a name is empty, the batch size is no number, or an option stands without --tasks.
    """
    from llmtrain.errors import UserError

    for option, value in {"--limit": limit, "--task-data": data, "--task-files": files}.items():
        _require_companion(option, value, "--tasks", tasks)
    _require_companion("--trust-task-files", trust_files or None, "--task-files", files)
    if tasks is None:
        _require_companion(
            "--batch-size", None if batch_size == "auto" else batch_size, "--tasks", tasks
        )
        return None
    from llmtrain.evaluation.tasks import TaskOptions

    names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",")))
    if not all(names):
        raise UserError(
            f"--tasks {tasks!r} holds an empty name", hint="such as --tasks lambada_openai,piqa"
        )
    if batch_size != "auto" and not (batch_size.isdecimal() and int(batch_size) > 0):
        raise UserError(
            f"--batch-size {batch_size!r} is no number", hint="auto, or a number from 1 on"
        )
    return TaskOptions(
        names,
        limit,
        "auto" if batch_size == "auto" else int(batch_size),
        data,
        files,
        trust_files,
        device,
    )


def _require_companion(option: str, value: object, companion: str, given: object) -> None:
    from llmtrain.errors import UserError

    if value is not None and given is None:
        raise UserError(f"{option} goes with {companion}", hint="llmtrain eval --help")
