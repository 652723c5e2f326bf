"""lm-eval with a folder of weights in it: the half of `tasks.py` that imports it.

Why a class of our own: it gives lm-eval the tokenizer that the folder does not hold, reports progress where lm-eval
draws bars, and reads an answer longer than a short context in parts, where lm-eval fails by an assertion.

    scores = score(load(folder, "auto", "auto"), load_task(source, None, None), None, on_progress).scores
"""

import contextlib
import difflib
import io
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lm_eval
import tqdm
from jinja2 import meta
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import env as templates_of_lm_eval

from llmtrain.checkpoints.gpt2_folder import load_shape
from llmtrain.errors import RunFailed, UserError
from llmtrain.evaluation.hf_models import load_transformers, own_tokenizer
from llmtrain.evaluation.tasks import Score, TaskSource
from llmtrain.model.tokenizer import fast_tokenizer, tokenizer_for_eot
from llmtrain.runtime.device import resolve_device

CPU_BATCH = 8
"""What "auto" is on a CPU, whose memory has no limit that could be felt for."""

BOOTSTRAPS = 1000
"""Resamples for the standard error of a perplexity: lm-eval's 100,000 take minutes and change it by 2%."""

_Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""What is asked in words, and the tokens of the context and of the answer."""


class Harness(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """A folder of weights as lm-eval wants a model; counts what it is asked."""

    def __init__(self, folder: Path, device: str, batch: int | Literal["auto"]) -> None:
        tokenizer = own_tokenizer(folder)
        where = resolve_device(device)
        model: Any = load_transformers(folder)
        super().__init__(
            pretrained=model.to(where),
            tokenizer=tokenizer
            or fast_tokenizer(tokenizer_for_eot(load_shape(folder).eot, folder)),
            backend="causal",
            batch_size=CPU_BATCH if batch == "auto" and where.type == "cpu" else batch,
        )
        self.folder = folder
        self.on_progress: Callable[[int, int], None] = lambda done, total: None
        self.requests = self.truncated = self._done = 0

    def start(self, on_progress: Callable[[int, int], None]) -> None:
        """Count from nought, for a new task."""
        self.on_progress = on_progress
        self.requests = self.truncated = self._done = 0

    def _loglikelihood_tokens(
        self, requests: list[_Request], *args: Any, **options: Any
    ) -> list[tuple[float, bool]]:
        """Log likelihood of each answer, and whether every token of it is the likeliest."""
        self.requests += len(requests)
        self.truncated += sum(
            len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests
        )
        pieces = [list(_pieces(request, self.max_length)) for request in requests]
        found = iter(
            super()._loglikelihood_tokens([p for some in pieces for p in some], *args, **options)
        )
        together = [list(islice(found, len(some))) for some in pieces]
        return [(sum(nats for nats, _ in some), all(best for _, best in some)) for some in together]

    def _model_call(self, inps: Any, *args: Any, **options: Any) -> Any:
        self.on_progress(min(self._done, self.requests), self.requests)
        self._done += len(inps)
        return super()._model_call(inps, *args, **options)


def _pieces(request: _Request, context: int) -> Iterator[_Request]:
    """An answer longer than the model's context in parts, each behind what comes before it; else as it is."""
    _, before, answer = request
    if len(answer) <= context:
        yield request
        return
    for start in range(0, len(answer), context):
        yield None, before + answer[:start], answer[start : start + context]


@dataclass(frozen=True)
class Measured:
    """What one task gave."""

    scores: list[Score]
    truncated: float
    """Share of requests whose start was cut off."""
    seconds: float


def load(folder: Path, device: str, batch: int | Literal["auto"]) -> Harness:
    """The model of a folder, ready to be asked.

    Raises:
        UserError: it cannot be loaded, or nobody knows its tokenizer.
    """
    with _quiet():
        return Harness(folder, device, batch)


def load_task(source: TaskSource, files: Path | None, limit: int | None) -> dict[str, Any]:
    """What lm-eval makes of a name: one task with its documents, or those of a group.

    Args:
        source: which.
        files: a folder with task files of the user.
        limit: only the first so many documents will be asked.

    Raises:
        UserError: there is none of this name, or its documents lack a field or an answer.
        RunFailed: its data set cannot be had.
    """
    local = isinstance(source.spec, dict)
    with _quiet():
        manager = _manager(files, everything=False)
        known = manager.task_index.get(source.name)
        if not local and (known is None or known.kind.name in ("GROUP", "TAG")):
            manager = _manager(files, everything=True)  # whose tasks a group may name
        if not local and source.name not in manager.all_tasks:
            near = difflib.get_close_matches(source.name, manager.all_tasks, n=3)
            raise UserError(
                f"lm-eval has no task {source.name!r}",
                hint=f"did you mean {' or '.join(near)}?"
                if near
                else "`lm-eval ls tasks` lists them",
            )
        try:
            loaded: dict[str, Any] = manager.load([source.spec])
        except Exception as error:  # of many libraries, and of the task's own code
            if local:
                raise _bad_data(source, error) from error
            raise RunFailed(
                f"the task {source.name} cannot be loaded: {type(error).__name__}: {error}",
                hint="check the network and HF_HUB_OFFLINE; offline: --task-data FOLDER",
            ) from error
    if local:
        _require_fields(source, loaded["tasks"][source.name])
        _require_answers(source, loaded["tasks"][source.name], limit)
    return loaded


def score(
    harness: Harness,
    task: dict[str, Any],
    limit: int | None,
    on_progress: Callable[[int, int], None],
) -> Measured:
    """Ask a model everything that a task wants to know.

    Args:
        harness: the model.
        task: of `load_task`.
        limit: only the first so many documents.
        on_progress: called with requests done and in all; may raise to stop.

    Raises:
        RunFailed: a score is not finite.
    """
    started = time.perf_counter()
    harness.start(on_progress)
    for one in task["tasks"].values():  # as lm-eval's own command does it
        if one.get_config("num_fewshot") is None:
            one.set_config(key="num_fewshot", value=0)
        one.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    with _quiet():
        try:
            results = lm_eval.evaluate(
                lm=harness,
                task_dict=task,
                limit=limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
            )
        except OverflowError:
            raise RunFailed(
                f"a perplexity of {harness.folder} does not fit a float",
                hint="its training diverged",
            ) from None
    assert results is not None  # there is one process
    scores = list(_scores(results))
    for got in scores:
        if not math.isfinite(got.value):
            raise RunFailed(
                f"{got.metric} of {harness.folder} in {got.task} is {got.value:g}",
                hint="its weights are damaged or its training diverged: llmtrain verify tells which",
            )
    share = harness.truncated / harness.requests if harness.requests else 0.0
    return Measured(scores, share, time.perf_counter() - started)


def _scores(results: dict[str, Any]) -> Iterator[Score]:
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            stderr = values.get(f"{metric}_stderr,{chosen}")
            known = isinstance(stderr, float | int) and math.isfinite(stderr)
            yield Score(
                task=task,
                metric=metric if chosen == "none" else key,
                value=float(value),
                stderr=float(stderr) if known else None,
                higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                documents=results["n-samples"].get(task, {}).get("effective"),
            )


@cache
def _manager(files: Path | None, *, everything: bool) -> TaskManager:
    """lm-eval's index of tasks; to read all of its own takes seconds."""
    return TaskManager(include_path=files, include_defaults=everything)


def _require_fields(source: TaskSource, task: Any) -> None:
    """Raise a UserError unless every document has the fields that the task's templates name."""
    assert isinstance(source.spec, dict)
    templates = [
        str(source.spec.get(f"doc_to_{part}", "")) for part in ("text", "target", "choice")
    ]
    fields = set().union(
        *(meta.find_undeclared_variables(templates_of_lm_eval.parse(text)) for text in templates)
    )
    fields |= {text for text in templates if text.isidentifier()}
    table = task.eval_docs.data.table
    for name in sorted(fields):
        if name not in table.column_names or table.column(name).null_count:
            raise _bad_data(source, f"a document has no field {name!r}")


def _require_answers(source: TaskSource, task: Any, limit: int | None) -> None:
    """Raise a UserError unless one of the choices of every document is right.

    lm-eval looks for the answer when the model has been asked everything, and counts a missing one as missed.
    """
    if task.config.doc_to_choice is None:
        return
    for number, document in enumerate(islice(task.eval_docs, limit), start=1):
        try:
            # Of several contexts with one ending, as in WinoGrande, the text is the number of the right one.
            right = (task.doc_to_text if task.multiple_input else task.doc_to_target)(document)
            choices = task.doc_to_choice(document)
        except Exception as error:  # a template may compute anything
            raise _bad_data(
                source, f"document {number:,}: {type(error).__name__}: {error}"
            ) from error
        if right not in range(len(choices)):
            raise _bad_data(
                source, f"document {number:,}: of {len(choices)} choices, {right!r} is right"
            )


def _bad_data(source: TaskSource, reason: object) -> UserError:
    return UserError(
        f"{source.source} does not hold documents of {source.name}: {reason}",
        hint="JSON lines with the fields of its data set on the hub",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No word, bar or process of lm-eval's own: results go to standard output, and progress is ours."""
    bar: Any = tqdm.tqdm
    logger = logging.getLogger("lm_eval")
    level, init, alone = logger.level, bar.__init__, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    bar.__init__ = lambda self, *args, **options: init(self, *args, **options | {"disable": True})
    os.environ["DISABLE_MULTIPROC"] = "1"  # bootstraps in this process
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        bar.__init__ = init
        if alone is None:
            del os.environ["DISABLE_MULTIPROC"]
