"""Runs with batches whose loss spikes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_training import Build
from torch import Tensor, nn

from llmtrain.config.schema import RunConfig
from llmtrain.data.dataloader import read_windows
from llmtrain.data.sampler import Sampler
from llmtrain.data.token_data import open_data
from llmtrain.training.worker import Worker

BAD_BATCH = 14
"""Counted from 0: step 15 reads it unless a rewind has skipped it."""
SPIKES = {"window": 8, "threshold": 20.0, "rewind_steps": 4}
CHECKPOINT = {"snapshot_every": 1, "state_every": 4, "keep_states": 3}


class Poisoned(nn.Module):
    """A model that multiplies the loss of batches that start with one window."""

    def __init__(self, model: nn.Module, window: Tensor, factor: float) -> None:
        super().__init__()
        self.model, self.window, self.factor = model, window, factor

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.model(tokens, targets)
        return (
            loss * self.factor if torch.equal(tokens[0], self.window[: tokens.shape[1]]) else loss
        )


def bad_batches(tiny: Build, factor: float, *batches: int) -> Callable[[Worker, int], nn.Module]:
    """Return a `compile_model` for models that multiply the loss of some batches."""
    config = tiny()
    reader = open_data(Path(config.data.path)).reader("train")
    sampler = Sampler(len(reader), 16, 8, config.seed)

    def window(number: int) -> Tensor:
        return torch.from_numpy(read_windows(reader, sampler.rows(number)[:1], 16))[0, :-1]

    def poisoned(worker: Worker, micro_batch: int) -> nn.Module:
        model: nn.Module = worker.model
        for number in batches or (BAD_BATCH,):
            model = Poisoned(model, window(number), factor)
        return model

    return poisoned


def run_config(
    tiny: Build, action: str = "log", on_nonfinite: str = "stop", **more: Any
) -> RunConfig:
    sections = {"checkpoint": CHECKPOINT, "eval": {"every": 6, "batch": 4}, "model__dropout": 0.1}
    overrides = {"train__max_steps": 24, "train__on_nonfinite": on_nonfinite, **sections, **more}
    return tiny(spikes=SPIKES | {"action": action}, **overrides)
