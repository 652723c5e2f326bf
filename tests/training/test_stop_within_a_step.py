"""A signal ends a long micro-batch at once; the last finished step is saved."""

import os
import signal
import time
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from tiny_training import Build, assert_same_run, quiet

from llmtrain.runtime.signals import Interrupted
from llmtrain.storage.run_folder import RunFolder, step_folders
from llmtrain.training.run import pretrain

STEP = 2
"""Last finished step when the signal arrives."""


class Stopwatch:
    """Sends SIGTERM a fraction of a step after step `STEP`, as seen in the log."""

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
@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_a_signal_abandons_a_long_micro_batch(tiny: Build, tmp_path: Path, fraction: float) -> None:
    """In the forward pass, and in the backward pass."""
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
    watch = Stopwatch(fraction)
    with pytest.raises(Interrupted) as stopped:
        pretrain(config, tmp_path / "stopped", log=watch.log)
    taken = time.perf_counter() - watch.sent
    assert stopped.value.exit_code == 143
    assert taken < 0.3 * watch.step_seconds
    assert list(step_folders(RunFolder(tmp_path / "stopped").states)) == [STEP]
    assert_same_run(quiet(config, tmp_path / "stopped"), quiet(config, tmp_path / "whole"))
