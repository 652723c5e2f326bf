"""Scoring with lm-eval. Importing this module imports lm-eval, which takes seconds.

Why a subclass of HFLM: it supplies our tokenizer for folders without one, reports progress, and
splits an answer longer than the context, on which lm-eval fails an assertion.
"""

import difflib
import importlib.metadata
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import lm_eval
from jinja2 import meta
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import env as template_environment

from llmtrain.checkpoints.gpt2_folder import load_shape
from llmtrain.errors import RunFailed, UserError
from llmtrain.evaluation.hf_models import load_transformers, own_tokenizer
from llmtrain.evaluation.options import TaskDefinition, TaskOptions
from llmtrain.evaluation.results import Score, TaskResult
from llmtrain.model.tokenizer import fast_tokenizer, tokenizer_for_eot
from llmtrain.runtime.device import resolve_device

CPU_BATCH = 8
"""Batch size for "auto" on a CPU, where lm-eval cannot probe the memory."""
BOOTSTRAPS = 1000
"""Resamples for the standard error of a perplexity; lm-eval's 100,000 take minutes and
change it by 2%."""

logging.getLogger("lm_eval").setLevel(logging.ERROR)
os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval: bootstrap in this process

_task_manager = cache(TaskManager)  # indexing lm-eval's own tasks takes seconds

_Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Context and answer as text, tokens of the context, tokens of the answer."""


class Scorer:
    """Tasks, loaded once, and the model of the folder scored last."""

    def __init__(self, definitions: list[TaskDefinition], options: TaskOptions) -> None:
        self._options = options
        # Load every task first, so that a wrong name fails before hours of scoring.
        self._tasks = {each.name: _load_task(each, options) for each in definitions}
        self._model: _Model | None = None

    def score(
        self, folder: Path, definition: TaskDefinition, on_progress: Callable[[int, int], None]
    ) -> TaskResult:
        """Score the weights in a folder on one task."""
        if self._model is None or self._model.folder != folder:
            self._model = None  # free the memory first
            self._model = _Model(folder, self._options)
        model, started = self._model, time.perf_counter()
        model.start(on_progress)
        scores = _evaluate(model, self._tasks[definition.name], self._options.limit)
        return TaskResult(
            task=definition.name,
            source=definition.source,
            limit=self._options.limit,
            lm_eval=importlib.metadata.version("lm-eval"),
            context=model.max_length,
            truncated=model.truncated / max(model.requests, 1),
            seconds=time.perf_counter() - started,
            scores=scores,
        )


class _Model(HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """A weights folder as an lm-eval model."""

    def __init__(self, folder: Path, options: TaskOptions) -> None:
        own = own_tokenizer(folder)
        device = resolve_device(options.device)
        model: Any = load_transformers(folder)
        batch = CPU_BATCH if options.batch == "auto" and device.type == "cpu" else options.batch
        super().__init__(
            pretrained=model.to(device),
            tokenizer=own or fast_tokenizer(tokenizer_for_eot(load_shape(folder).eot, folder)),
            backend="causal",
            batch_size=batch,
        )
        self.folder = folder
        self.start(lambda done, total: None)

    def start(self, on_progress: Callable[[int, int], None]) -> None:
        """Reset the counters for a new task."""
        self.on_progress = on_progress
        self.requests = self.truncated = self._done = 0

    def _loglikelihood_tokens(
        self, requests: list[_Request], disable_tqdm: bool = True, **options: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each answer and whether greedy decoding gives it."""
        self.requests += len(requests)
        self.truncated += sum(
            len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests
        )
        parts = [list(_split(request, self.max_length)) for request in requests]
        flat = [part for some in parts for part in some]
        found = iter(super()._loglikelihood_tokens(flat, disable_tqdm=True, **options))
        grouped = [list(islice(found, len(some))) for some in parts]
        return [(sum(nats for nats, _ in some), all(best for _, best in some)) for some in grouped]

    def _model_call(self, inps: Any, *args: Any, **options: Any) -> Any:
        self.on_progress(min(self._done, self.requests), self.requests)
        self._done += len(inps)
        return super()._model_call(inps, *args, **options)


def _split(request: _Request, context: int) -> Iterator[_Request]:
    """Split an answer longer than the context into parts, each after the text before it."""
    _, before, answer = request
    for start in range(0, len(answer) or 1, context):
        yield None, before + answer[:start], answer[start : start + context]


def _evaluate(model: _Model, task: dict[str, Any], limit: int | None) -> list[Score]:
    for each in task["tasks"].values():  # as lm-eval's own command does
        if each.get_config("num_fewshot") is None:
            each.set_config(key="num_fewshot", value=0)
        each.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    settings: Any = {"bootstrap_iters": BOOTSTRAPS, "log_samples": False}
    try:
        results = lm_eval.evaluate(lm=model, task_dict=task, limit=limit, **settings)
    except OverflowError:
        problem = f"a perplexity of {model.folder} overflows"
        raise RunFailed(problem, hint="its training diverged") from None
    assert results is not None  # only rank 0 gets results, and this is the only process
    return list(_scores(model.folder, results))


def _scores(folder: Path, results: dict[str, Any]) -> Iterator[Score]:
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            if not math.isfinite(value):
                raise RunFailed(
                    f"{metric} of {folder} in {task} is {value:g}",
                    hint="check the weights with llmtrain verify; if intact, training diverged",
                )
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


def _load_task(definition: TaskDefinition, options: TaskOptions) -> dict[str, Any]:
    """Load one task with its documents, or all tasks of a group."""
    local = isinstance(definition.config, dict)
    manager = _task_manager(include_path=options.files, include_defaults=not local)
    if not local and definition.name not in manager.all_tasks:
        near = difflib.get_close_matches(definition.name, manager.all_tasks, n=3)
        suggestion = f"did you mean {' or '.join(near)}?" if near else "see `lm-eval ls tasks`"
        raise UserError(f"lm-eval has no task {definition.name!r}", hint=suggestion)
    try:
        loaded: dict[str, Any] = manager.load([definition.config])
        if local:
            _check_documents(definition, loaded["tasks"][definition.name], options.limit)
    except Exception as error:  # raised by many libraries, or by the task's own code
        if local:
            raise UserError(
                f"{definition.source} does not contain documents of {definition.name}: {error}",
                hint="write JSON lines with the fields of its hub data set",
            ) from error
        raise RunFailed(
            f"the task {definition.name} cannot be loaded: {type(error).__name__}: {error}",
            hint="check the network and HF_HUB_OFFLINE; offline, pass --task-data FOLDER",
        ) from error
    return loaded


def _check_documents(definition: TaskDefinition, task: Any, limit: int | None) -> None:
    assert isinstance(definition.config, dict)
    parts = ("doc_to_text", "doc_to_target", "doc_to_choice")
    templates = [str(definition.config.get(part, "")) for part in parts]
    fields = set(filter(str.isidentifier, templates))
    for text in templates:
        fields |= meta.find_undeclared_variables(template_environment.parse(text))
    for number, document in enumerate(islice(task.eval_docs, limit), start=1):
        try:
            _check_document(document, fields, task)
        except Exception as error:  # a template may compute anything
            raise ValueError(f"document {number:,}: {type(error).__name__}: {error}") from error


def _check_document(document: dict[str, Any], fields: set[str], task: Any) -> None:
    """Raise if a document lacks a field of the templates, or its answer is not among the choices.

    lm-eval looks up the answer only after scoring, and counts a missing one as wrong.
    """
    if absent := sorted(name for name in fields if document.get(name) is None):
        raise KeyError(absent[0])
    if task.config.doc_to_choice is None:
        return
    # With several contexts for one ending (WinoGrande), the text is the answer's index.
    right = (task.doc_to_text if task.multiple_input else task.doc_to_target)(document)
    count = len(task.doc_to_choice(document))
    if right not in range(count):
        raise ValueError(f"answer {right!r} is not one of {count} choices")
