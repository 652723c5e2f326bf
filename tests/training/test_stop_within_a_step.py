"""A signal ends a long micro-batch at once; the last finished step is saved."""

import os
import signal
import time
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from tiny_training import Build, assert_same_run, quiet
from torch import Tensor, nn

from llmtrain.runtime.distributed import World
from llmtrain.runtime.signals import Interrupt, Interrupted
from llmtrain.storage.run_folder import RunFolder, step_folders
from llmtrain.training.run import pretrain
from llmtrain.training.worker import make_worker

STEP = 2
"""Last finished step when the signal arrives."""


class SignalWithinStep:
    """Log that sends SIGTERM a fraction of a step after it receives step `STEP`."""

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction
        self.steps: list[float] = []
        self.sent = 0.0

    def log(self, line: str) -> None:
        if line.split()[0].isdigit():
            self.steps.append(time.perf_counter())
            if len(self.steps) == STEP:
                Timer(self.fraction * self.step_seconds, self._send).start()

    @property
    def step_seconds(self) -> float:
        return self.steps[1] - self.steps[0]

    def _send(self) -> None:
        self.sent = time.perf_counter()
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_signal_abandons_a_long_micro_batch(tiny: Build, tmp_path: Path) -> None:
    model: dict[str, Any] = {"n_layer": 8, "n_head": 2, "n_embd": 64, "vocab_size": 264}
    config = tiny(
        model=model | {"dropout": 0.1},
        data__block_size=32,
        train__max_steps=STEP + 1,
        train__batch_sequences=1024,
        train__micro_batch=1024,
        schedule={"name": "constant", "warmup_steps": 1},
        eval={"every": 100},
        log={"every": 1},
    )
    watch = SignalWithinStep(0.1)
    with pytest.raises(Interrupted) as stopped:
        pretrain(config, tmp_path / "stopped", log=watch.log)
    taken = time.perf_counter() - watch.sent
    assert stopped.value.exit_code == 143
    assert taken < 0.3 * watch.step_seconds
    assert list(step_folders(RunFolder(tmp_path / "stopped").states)) == [STEP]
    assert_same_run(quiet(config, tmp_path / "stopped"), quiet(config, tmp_path / "whole"))


@pytest.mark.slow
def test_a_backward_pass_stops_between_blocks(tiny: Build) -> None:
    """The backward pass reaches the first block last, so it gets no gradients."""
    model = {"n_layer": 8, "n_head": 2, "n_embd": 64, "vocab_size": 264}
    worker = make_worker(tiny(model=model), World(), torch.device("cpu"), pytest.fail)
    blocks = worker.model.transformer.h
    windows = torch.arange(512 * 17).view(512, 17) % 257

    def stop_at_the_last_block(block: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        output.register_hook(lambda gradient: Timer(0.01, os.kill, (os.getpid(), 15)).start())

    blocks[-1].register_forward_hook(stop_at_the_last_block)
    with Interrupt(quiet=True) as interrupt, pytest.raises(Interrupted), interrupt.raising():
        worker.backward(worker.model, windows)
    assert all(parameter.grad is None for parameter in blocks[0].parameters())
