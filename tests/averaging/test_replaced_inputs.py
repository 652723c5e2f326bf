"""Inputs that training replaces while they are averaged: nothing is committed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import MakeRun

from llmtrain.averaging.average import average
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.request import AverageRequest, MergeOptions
from llmtrain.checkpoints.series import run_series
from llmtrain.errors import RunFailed, UserError
from llmtrain.storage.run_folder import RunFolder
from llmtrain.training.checkpoint import set_aside


def rewind(run: RunFolder) -> None:
    """Set the newest snapshot aside, as a rewind does."""
    set_aside(run.snapshot(30), "rewound")


def rewind_and_train(run: RunFolder) -> None:
    """Set the newest snapshot aside and write another one of the same step and size."""
    aside = set_aside(run.snapshot(30), "rewound")
    path = shutil.copytree(aside, run.snapshot(30)) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


def overwrite(run: RunFolder) -> None:
    """Replace only the weights file, by rename."""
    path = run.snapshot(30) / "model.safetensors"
    Path(shutil.copy2(path, path.with_name("new"))).replace(path)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("when", [3, -1])  # after opening the inputs, and at the end
@pytest.mark.parametrize("replace", [rewind, rewind_and_train, overwrite])
def test_replaced_inputs(
    make_run: MakeRun, replace: Callable[[RunFolder], None], when: int, verify: bool
) -> None:
    run = make_run([10, 20, 30])
    series = run_series(run)
    specs = make_specs(series, AverageRequest(every=10, window=3))
    calls: list[tuple[int, int]] = []
    average(series, specs, MergeOptions(), progress=lambda *done: calls.append(done))
    shutil.rmtree(run.averages)
    wanted, seen = range(len(calls))[when], 0

    def progress(done: int, total: int) -> None:
        nonlocal seen
        if seen == wanted:
            replace(run)
        seen += 1

    expected = r"step-00000030/model\.safetensors was (replaced|moved)"
    with pytest.raises((UserError, RunFailed), match=expected):
        average(series, specs, MergeOptions(verify=verify), progress=progress)
    assert not list(run.averages.rglob("*.safetensors"))
