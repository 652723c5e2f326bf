"""Evaluation: tokens per second of the loss on a split, beside those of training the same model.

Why beside training: an evaluation is a forward pass, a third of the work of a step. What is slower than
that is waste, paid again for every snapshot and every average.

    evaluate(model="6x384")
"""

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import typer

from llmtrain.config import ModelConfig
from llmtrain.data.nanogpt import open_nanogpt
from llmtrain.evaluation.loss import evaluate as loss_of_split
from llmtrain.hardware import peak_memory, resolve_device, resolve_precision
from llmtrain.model import GPT

from . import loops
from .measure import Figures, Row, Side, Worker, publish, rows, take_turns
from .train import OURS, shape_of, write_tokens

if TYPE_CHECKING:
    from .train import Shape

_TARGETS = {("eval", "tokens/s"): "≥ 2.8 × training"}
