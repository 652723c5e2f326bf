"""The micro-batch is found, kept and reduced, with real trials and real memory limits."""

import importlib
import os
import re
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import Build, assert_same_run, quiet
from worlds import in_processes, train_together

from llmtrain.config.schema import RunConfig
from llmtrain.errors import RunFailed
from llmtrain.runtime.distributed import init_distributed
from llmtrain.runtime.signals import Interrupted
from llmtrain.storage.run_folder import RunFolder, step_folders
from llmtrain.training.checkpoint import TrainingProgress, load_checkpoint
from llmtrain.training.micro_batch import find_micro_batch
from llmtrain.training.run import pretrain
from llmtrain.training.worker import make_worker

pytestmark = pytest.mark.slow

ROOM = 64 << 20
"""Bytes that a limited process may allocate."""
LIMITED = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory"
)


def micro_batch_of(run: RunFolder) -> tuple[int, int]:
    """Return the micro-batch in the newest checkpoint and the number of processes it is for."""
    progress = load_checkpoint(list(step_folders(run.states).values())[-1]).progress
    return progress.micro_batch, progress.micro_batch_for["processes"]


def large(tiny: Build, **settings: Any) -> RunConfig:
    """About 1 MB per sequence; a batch of 2 · 61 sequences has few divisors."""
    train = tiny().train.model_dump() | {"max_steps": 1, "batch_sequences": 122}
    return tiny(
        data=tiny().data.model_dump() | {"block_size": 128},
        model={"n_layer": 4, "n_head": 2, "n_embd": 64, "vocab_size": 264, "dropout": 0.1},
        schedule={"name": "constant", "warmup_steps": 0},
        train=train | settings,
        averages=[],
    )


@contextmanager
def memory_limit(room: int) -> Iterator[None]:
    """Limit what this process may allocate."""
    taken = re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())
    assert taken is not None
    limit = int(taken[1]) * 1024 + room
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_a_planned_peak_above_the_free_memory_is_a_warning(tiny: Build, tmp_path: Path) -> None:
    """The warning comes before the first step."""
    for sequences, expected in ((1 << 22, 1), (8, 0)):
        lines: list[str] = []
        config = tiny(train__batch_sequences=sequences, train__micro_batch=sequences)
        with pytest.raises(Interrupted):
            pretrain(
                config,
                tmp_path / str(sequences),
                max_seconds=0,
                warn=lines.append,
                log=lines.append,
            )
        assert sum("memory may run out" in line for line in lines) == expected


def test_the_warning_comes_before_the_model_is_allocated(tiny: Build, tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(RunFailed, match="out of memory"):
        pretrain(tiny(model__vocab_size=10**12), tmp_path / "run", warn=lines.append)
    assert "memory may run out" in lines[0]


def test_auto_trains_like_the_number_that_it_finds(tiny: Build, tmp_path: Path) -> None:
    """Bitwise, with dropout: trials leave no trace, and a resumed run needs none."""
    lines: list[str] = []
    options = {"model__dropout": 0.2, "train__micro_batch": "auto"}
    pretrain(tiny(**options, train__max_steps=4), tmp_path / "auto", log=lines.append)
    assert sum("the fastest of 1, 2" in line for line in lines) == 1
    size, _ = micro_batch_of(RunFolder(tmp_path / "auto"))
    expected = quiet(tiny(**options | {"train__micro_batch": size}), tmp_path / "explicit")
    lines.clear()
    run = pretrain(tiny(**options, log={"every": 3}), tmp_path / "auto", log=lines.append).run
    assert f"micro-batch: {size}, as before" in lines
    assert micro_batch_of(run)[0] == size
    (run.metrics).write_text(expected.metrics.read_text())  # the first part logged its own end
    assert_same_run(expected, run)
    assert "micro_batch: auto" in run.config.read_text()


def test_another_number_of_processes_searches_again(tiny: Build, tmp_path: Path) -> None:
    run = quiet(tiny(train__micro_batch="auto", train__max_steps=4), tmp_path / "run")
    assert micro_batch_of(run)[1] == 1
    train_together(2, tiny(train__micro_batch="auto", train__max_steps=6), run.path)
    size, processes = micro_batch_of(run)
    assert processes == 2
    assert 4 % size == 0


def found_micro_batch(config: RunConfig) -> int:
    """Return the micro-batch found by this process; rank 1 is short of memory."""
    with init_distributed(torch.device("cpu"), spread=False) as (world, device):
        worker, progress = make_worker(config, world, device, lambda line: None), TrainingProgress()
        with nullcontext() if world.is_rank_zero else memory_limit(ROOM):
            find_micro_batch(worker, progress, lambda line: None)
        assert all(parameter.grad is None for parameter in worker.model.parameters())
        return progress.micro_batch


@LIMITED
@pytest.mark.parametrize("asked", [61, "auto"])
def test_processes_agree_on_a_micro_batch_that_fits_all(tiny: Build, asked: int | str) -> None:
    assert in_processes(2, found_micro_batch, large(tiny, micro_batch=asked)) == [1, 1]


def under_limit(config: RunConfig, folder: Path, room: int) -> tuple[list[str], str]:
    """Return a run's warnings and its failure under a memory limit.

    The limit ends when a pass has failed: the memory freed by a failed pass may be too fragmented
    for the stack of the thread that writes the snapshot.
    """
    warnings: list[str] = []

    def warn(line: str) -> None:
        warnings.append(line)
        if line.startswith("out of memory"):
            most = resource.getrlimit(resource.RLIMIT_DATA)[1]
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))

    importlib.import_module("torch._dynamo")  # AdamW imports it
    os.environ.pop("RANK")  # no launcher: no process group with threads
    threading.stack_size(1 << 20)
    try:
        with memory_limit(room):
            pretrain(config, folder, log=lambda line: None, warn=warn)
    except RunFailed as error:
        return warnings, f"{error}; {error.hint}"
    return warnings, ""


@LIMITED
def test_out_of_memory_continues_with_a_smaller_micro_batch(tiny: Build, tmp_path: Path) -> None:
    [(warnings, failure)] = in_processes(
        1, under_limit, large(tiny, micro_batch=61), tmp_path / "limited", ROOM
    )
    assert (warnings, failure) == (["out of memory at micro-batch 61: continuing with 2"], "")
    run = RunFolder(tmp_path / "limited")
    assert micro_batch_of(run)[0] == 2
    assert_same_run(quiet(large(tiny, micro_batch=2), tmp_path / "explicit"), run)


@LIMITED
def test_no_memory_for_one_sequence_is_a_one_line_error(tiny: Build, tmp_path: Path) -> None:
    config = large(tiny, batch_sequences=1, micro_batch=1)
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"block_size": 4096}),
            "model": config.model.model_copy(update={"dropout": 0.0}),
        }
    )
    [(warnings, failure)] = in_processes(1, under_limit, config, tmp_path / "run", 24 << 20)
    assert all("val split" in line or "memory" in line for line in warnings)
    assert failure.startswith("out of memory at micro-batch 1; ")
    assert "activation_checkpointing" in failure


@pytest.mark.gpu
def test_a_gpu_finds_and_reduces_the_micro_batch(tiny: Build, tmp_path: Path) -> None:
    config = large(tiny, batch_sequences=4096, micro_batch="auto", device="cuda", compile=False)
    total = torch.cuda.get_device_properties(0).total_memory
    auto = quiet(config, tmp_path / "auto")
    size, _ = micro_batch_of(auto)
    assert_same_run(quiet(config.with_micro_batch(size), tmp_path / "explicit"), auto)
    torch.cuda.set_per_process_memory_fraction(2e9 / total)
    try:
        warnings: list[str] = []
        lowered = quiet(config.with_micro_batch(4096), tmp_path / "lowered", warn=warnings.append)
        assert "out of memory at micro-batch 4096: continuing with 2048" in warnings
        size, _ = micro_batch_of(lowered)
        assert_same_run(quiet(config.with_micro_batch(size), tmp_path / "lower"), lowered)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
