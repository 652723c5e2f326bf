"""Options of evaluation and generation; their `Doc` texts are the help texts of the commands.

Importing this module is fast: it does not import torch.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from typing_extensions import Doc

from llmtrain.errors import UserError

LOWEST_TEMPERATURE = 1e-6
"""Lowest temperature above 0: logits divided by less would overflow float32."""

Device = Annotated[str, Doc("auto, cpu, cuda, cuda:N or mps.")]


@dataclass(frozen=True)
class EvalOptions:
    """How to measure losses. None takes the setting of the run, or the default outside a run."""

    data: Annotated[Path | None, Doc("Folder of token shards.")] = None
    split: Annotated[str, Doc("Split to evaluate.")] = "val"
    tokens: Annotated[int | None, Doc("Evaluate only the first N tokens of the split.")] = None
    batch: Annotated[int | None, Doc("Windows in one forward pass.")] = None
    precision: Annotated[str | None, Doc("Precision of matrix products.")] = None
    device: Device = "auto"
    stride: Annotated[
        int | None, Doc("Tokens that each window predicts; earlier tokens are context only.")
    ] = None


@dataclass(frozen=True)
class TaskOptions:
    """Zero-shot tasks and how to score them."""

    tasks: Annotated[
        tuple[str, ...],
        Doc(
            "Comma-separated lm-eval tasks. lambada_openai, hellaswag, piqa, arc_easy, sciq and "
            "winogrande also run offline with --task-data."
        ),
    ]
    limit: Annotated[int | None, Doc("Score only the first N documents of each task.")] = None
    batch: Annotated[
        int | Literal["auto"],
        Doc("Requests in one forward pass; auto: as many as fit on the GPU, 8 on a CPU."),
    ] = "auto"
    data: Annotated[Path | None, Doc("Folder with TASK.jsonl (.zst, .gz) of these tasks.")] = None
    files: Annotated[Path | None, Doc("Folder of lm-eval task files. They are code.")] = None
    trust_files: Annotated[bool, Doc("Let --task-files run their code. Read it first.")] = False
    device: Device = "auto"


@dataclass(frozen=True)
class TaskDefinition:
    """A task as lm-eval loads it: by name, or from the content of a task file."""

    name: str
    config: str | dict[str, Any]
    source: str
    """Location of the documents: `hub`, a local file, or a folder of task files."""
    sha256: str
    """Hash of the local files that define the task; empty for lm-eval's own tasks."""


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token."""

    max_tokens: Annotated[int, Doc("Maximum number of tokens to generate.")] = 256
    temperature: Annotated[
        float, Doc("Divide the logits by this; 0 always takes the most likely token.")
    ] = 0.8
    top_k: Annotated[int | None, Doc("Sample only from the K most likely tokens.")] = None
    top_p: Annotated[
        float | None,
        Doc("Sample only from the fewest tokens with a total probability of at least P."),
    ] = None
    seed: Annotated[int, Doc("Random seed of the sampling.")] = 1337

    def __post_init__(self) -> None:
        """Raise a UserError if a value is out of range."""
        temperature, top_k, top_p = self.temperature, self.top_k, self.top_p
        problems = {
            "max_tokens": self.max_tokens < 1 and "is below 1",
            "temperature": not (temperature == 0 or LOWEST_TEMPERATURE <= temperature < math.inf)
            and f"is neither 0 nor at least {LOWEST_TEMPERATURE:g}",
            "top_k": top_k is not None and top_k < 1 and "is below 1",
            "top_p": top_p is not None and not 0 < top_p <= 1 and "is not in (0, 1]",
            "seed": not 0 <= self.seed < 2**63 and "is not between 0 and 2^63 - 1",
        }
        for name, problem in problems.items():
            if problem:
                option = f"--{name.replace('_', '-')}"
                message = f"{option} {getattr(self, name)} {problem}"
                raise UserError(message, hint="see llmtrain generate --help")
