"""The estimated peak memory against torch's profiler, a training process and a GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile

from llmtrain.config.schema import RunConfig
from llmtrain.evaluation.hf_models import IdArray
from llmtrain.evaluation.loss import evaluate
from llmtrain.model.gpt import GPT
from llmtrain.planning.memory import (
    Layout,
    Usage,
    device_memory,
    host_memory,
    micro_batch,
    peak,
    shortage,
)
from llmtrain.runtime.device import autocast
from llmtrain.runtime.distributed import World
from llmtrain.training.optimizers import build_optimizer
from llmtrain.training.worker import build_model

Build = Callable[..., RunConfig]


def planned_peak(config: RunConfig, *, cuda: bool = False) -> int:
    item = 2 if config.train.precision == "bfloat16" else 4
    return peak(device_memory(config, Layout(1, "ddp", item, cuda))).total


def a_trainer(config: RunConfig, device: torch.device) -> tuple[GPT, AdamW, Callable[[], None]]:
    """Return a model, its optimizer, and a function that allocates like `Trainer.step`."""
    model = build_model(config, None, World(), device, "float32")
    optimizer = build_optimizer(model, config.optimizer)
    micro = micro_batch(config)

    def step() -> None:
        for _ in range(config.batch_size // micro):
            windows = torch.randint(0, 100, (micro, config.data.block_size + 1), device=device)
            precision = "bfloat16" if config.train.precision == "bfloat16" else "float32"
            with autocast(device, precision):
                loss = model(windows[:, :-1], windows[:, 1:])
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, optimizer, step


def allocated_at_most(work: Callable[[], None]) -> int:
    """Return the peak bytes of tensors allocated by `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    now = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


SHAPES: dict[str, dict[str, Any]] = {
    "activations dominate": {"model__n_layer": 6, "data__block_size": 256},
    "the vocabulary dominates": {"model__vocab_size": 20_000},
    "gradients dominate": {
        "model__n_embd": 512,
        "train__micro_batch": 1,
        "train__batch_sequences": 1,
    },
    "the tied matrix dominates": {
        "model__vocab_size": 30_000,
        "train__micro_batch": 1,
        "train__batch_sequences": 1,
        "data__block_size": 16,
    },
    "one micro-batch": {"train__batch_sequences": 2},
    "biases": {"model__bias": True},
    "dropout": {"model__dropout": 0.1, "data__block_size": 128},
    "Muon": {"optimizer__name": "muon", "model__n_embd": 256, "train__micro_batch": 1},
    "small heads, attention dominates": {"model__n_head": 16, "data__block_size": 256},
    "slabs and chunks": {
        "model__vocab_size": 30_000,
        "data__block_size": 512,
        "train__micro_batch": 4,
    },
    "checkpointing": {
        "train__activation_checkpointing": True,
        "model__n_layer": 6,
        "data__block_size": 256,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_peak_equals_torch_allocations(
    planned: Build, shape: dict[str, Any], precision: str
) -> None:
    config = planned(**({"train__batch_sequences": 4} | shape), train__precision=precision)
    model, optimizer, step = a_trainer(config, torch.device("cpu"))
    step()  # creates the optimizer's moments
    kept = [tensor for state in optimizer.state.values() for tensor in state.values()]
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *kept])
    assert planned_peak(config) == pytest.approx(held + allocated_at_most(step), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "batch"),
    [
        ({}, 16),
        ({"data__block_size": 512, "model__n_head": 8}, 12),
        ({"model__vocab_size": 30_000}, 8),
    ],
    ids=["a block", "attention dominates", "the head"],
)
def test_the_peak_of_an_evaluation_equals_torch_allocations(
    planned: Build, shape: dict[str, Any], batch: int, precision: Literal["float32", "bfloat16"]
) -> None:
    config = planned(**shape, train__precision=precision, eval={"batch": batch})
    model = build_model(config, None, World(), torch.device("cpu"), "float32")
    tokens = IdArray(np.arange(2 * batch * config.data.block_size + 1) % 100)

    def evaluated() -> None:
        evaluate(
            model, tokens, np.ones(100, dtype=np.int64), block_size=config.data.block_size,
            batch=batch, device=torch.device("cpu"), precision=precision,
        )  # fmt: skip

    evaluated()
    layout = Layout(1, "ddp", 2 if precision == "bfloat16" else 4, cuda=False)
    (planned_one,) = (
        each for each in device_memory(config, layout) if each.moment == "in an evaluation"
    )
    most = allocated_at_most(evaluated)
    assert planned_one.copies + planned_one.activations == pytest.approx(most, rel=0.02)


RUN = """
import json, re, sys, threading
from contextlib import nullcontext
from pathlib import Path
from llmtrain.config.schema import RunConfig
from llmtrain.training import run, snapshots
from llmtrain.training.run import pretrain

run.keep_freed_memory = lambda device: nullcontext()  # measure needed memory only

# A slow disk: the copy of weights exists until the writer is waited for.
waited = threading.Event()
wait, staged_folder = snapshots.SnapshotWriter.wait, snapshots.staged_folder

def wait_and_let_go(writer):
    waited.set()
    wait(writer)
    waited.clear()

def staged_late(*arguments, **options):
    waited.wait()
    return staged_folder(*arguments, **options)

snapshots.SnapshotWriter.wait, snapshots.staged_folder = wait_and_let_go, staged_late

def resident(key):  # not ru_maxrss, which a child inherits
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def train(name, values):
    pretrain(RunConfig.model_validate(values), Path(name), log=lambda line: None)

values = json.load(sys.stdin)
heads = values["model"]["n_head"]
tiny = {"n_layer": 1, "n_embd": 8 * heads, "n_head": heads, "vocab_size": 264}
small = values | {"model": tiny}
train("small", small | {"data": values["data"] | {"block_size": 16}})  # loads all libraries
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmHWM")
train("run", values)
print(resident("VmHWM") - before)
"""


def grown(config: RunConfig, folder: Path) -> int:
    """Return the bytes by which a training process grows."""
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(config.model_dump(mode="json")),
        # Without the threshold, malloc keeps freed memory: up to a quarter more in a small model.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip  # keep the comment next to its line
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])  # after the log lines


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs the peak of a process from Linux"
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("layers", "width", "vocabulary"), [(6, 384, 264), (4, 256, 8_192)])
def test_a_training_process_grows_by_the_estimated_peak(
    planned: Build,
    data_folder: Path,
    tmp_path: Path,
    layers: int,
    width: int,
    vocabulary: int,
    precision: str,
) -> None:
    config = planned(
        data={"path": str(data_folder), "block_size": 256},
        model={"n_layer": layers, "n_head": width // 64, "n_embd": width, "vocab_size": vocabulary},
        train={
            "max_steps": 3, "batch_sequences": 8, "micro_batch": 8, "precision": precision,
            "compile": False, "device": "cpu",
        },
        checkpoint={"snapshot_every": 2},  # written in the third step
        averages=[{"kind": "ema", "decay": 0.9}],
    )  # fmt: skip  # one line per section
    assert planned_peak(config) == pytest.approx(grown(config, tmp_path), rel=0.15)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs the peak of a process from Linux"
)
def test_a_process_that_writes_during_training_grows_by_the_estimated_copy(
    planned: Build, data_folder: Path, tmp_path: Path
) -> None:
    """A model of 11M parameters with a step of 16 tokens: the parameters dominate memory."""
    writing, not_yet = (
        planned(
            data={"path": str(data_folder), "block_size": 16},
            model={"n_layer": 4, "n_head": 6, "n_embd": 384, "vocab_size": 10_000},
            train={
                "max_steps": 3,
                "batch_sequences": 1,
                "micro_batch": 1,
                "compile": False,
                "device": "cpu",
            },
            train__precision="float32",
            checkpoint={"snapshot_every": every},
        )
        for every in (2, 3)
    )
    more = planned_peak(writing) - planned_peak(not_yet)
    folders = [tmp_path / "writing", tmp_path / "not-yet"]
    for folder in folders:
        folder.mkdir()
    with_copy, without = (
        grown(config, at) for config, at in zip((writing, not_yet), folders, strict=True)
    )
    assert more > 4 * 10_000_000
    assert with_copy - without == pytest.approx(more, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("layers", "width", "vocabulary"), [(6, 384, 50_304), (12, 768, 264)])
def test_a_gpu_allocates_the_estimated_peak(
    planned: Build, layers: int, width: int, vocabulary: int, precision: str
) -> None:
    config = planned(
        data__block_size=1024,
        model={"n_layer": layers, "n_head": width // 64, "n_embd": width, "vocab_size": vocabulary},
        train__batch_sequences=8,
        train__micro_batch=8,
        train__precision=precision,
    )
    *_, step = a_trainer(config, torch.device("cuda"))
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    assert planned_peak(config, cuda=True) == pytest.approx(
        torch.cuda.max_memory_allocated(), rel=0.15
    )


def test_fsdp_shards_what_ddp_replicates(planned: Build) -> None:
    config = planned(train__batch_sequences=512, averages=[{"kind": "ema", "decay": 0.9}])
    alone, ddp, fsdp = (
        device_memory(config, Layout(devices, parallel, 2, cuda=True))
        for devices, parallel in ((1, "ddp"), (8, "ddp"), (8, "fsdp"))
    )
    for one, copied, sharded in zip(alone, ddp, fsdp, strict=True):
        assert (copied.weights, copied.optimizer, copied.averages) == (
            one.weights,
            one.optimizer,
            one.averages,
        )
        for part in ("weights", "optimizer"):
            assert getattr(sharded, part) == pytest.approx(getattr(one, part) / 8, rel=1e-3)
        assert sharded.activations == copied.activations
    assert {usage.buffers for usage in ddp} == {0}
    assert any(usage.buffers for usage in fsdp)


def test_ddp_keeps_gradient_buckets(planned: Build) -> None:
    config = planned(train__batch_sequences=16)
    one = planned(train__batch_sequences=2)
    alone, replicated = (
        device_memory(run, Layout(devices, "ddp", 2, cuda=True))[0]
        for run, devices in ((one, 1), (config, 8))
    )
    assert alone.gradients == 4 * 264 * 128  # the head's gradient
    assert replicated.gradients - alone.gradients == replicated.weights


def test_offloaded_averages_use_no_gpu_memory(planned: Build) -> None:
    layout = Layout(1, "ddp", 2, cuda=True)
    config = planned(averages=[{"kind": "lawa", "every": 1, "window": 5}])
    bare = planned()
    assert device_memory(config, layout)[0].averages == 0
    on_cpu = Layout(1, "ddp", 2, cuda=False)
    parameters = device_memory(bare, layout)[0].weights // 4
    assert device_memory(config, on_cpu)[0].averages == 5 * 4 * parameters


def test_a_cpu_holds_a_copy_of_weights_during_training(planned: Build) -> None:
    """If a snapshot precedes the last step; a GPU's copy is in host memory."""
    layout = Layout(1, "ddp", 2, cuda=False)
    often, at_the_end = (planned(checkpoint__snapshot_every=every) for every in (50, 100))
    parameters = device_memory(often, layout)[0].weights // 4
    assert {usage.written for usage in device_memory(often, layout)} == {4 * parameters}
    assert sum(usage.written for usage in device_memory(at_the_end, layout)) == 4 * parameters
    assert {usage.written for usage in device_memory(often, Layout(1, "ddp", 2, cuda=True))} == {0}
    mean = planned(checkpoint__snapshot_every=50, averages=[{"kind": "running-mean"}])
    assert {usage.written for usage in device_memory(mean, layout)} == {2 * 4 * parameters}


def test_the_host_holds_a_copy_of_saved_tensors(planned: Build) -> None:
    """A state (weights, two moments) and weights; with a running mean also its residual."""
    layout = Layout(1, "ddp", 2, cuda=True)
    parameters = device_memory(planned(), layout)[0].weights // 4
    assert host_memory(planned(), layout) == (3 + 1) * 4 * parameters
    mean = planned(averages=[{"kind": "running-mean"}])
    assert host_memory(mean, layout) == (3 + 2 + 2) * 4 * parameters


def test_a_shortage_names_the_peak_and_both_numbers() -> None:
    usage = Usage("at the loss", weights=10**9, activations=3 * 10**9)
    assert shortage(usage, 4e9) is None
    assert shortage(usage, 3.9e9) == (
        "memory may run out: the peak, at the loss, needs about 4.00 GB, and 3.90 GB are free"
    )
