"""Several processes train like one, and resume from each other's training checkpoints."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_training import EVERY_AVERAGE, Build, assert_same_run, events, interrupt_at, quiet
from worlds import in_processes, train, train_together

from llmtrain.config.schema import RunConfig
from llmtrain.errors import UserError, WriteFailed
from llmtrain.model.gpt import GPT
from llmtrain.runtime.distributed import World, init_distributed
from llmtrain.runtime.sharded import gather_on_rank_zero, to_local
from llmtrain.storage.integrity import integrity_problems
from llmtrain.storage.run_folder import RunFolder, step_folders
from llmtrain.training.checkpoint import read_tensors
from llmtrain.training.run import pretrain
from llmtrain.training.worker import build_model, resolve_parallel

pytestmark = pytest.mark.slow

SPREADS = [
    ("ddp", 2, 1),
    ("ddp", 4, 1),
    ("fsdp", 1, 1),
    ("fsdp", 2, 1),
    ("fsdp", 4, 1),
    ("hsdp", 4, 2),
]
"""train.parallel, processes, machines."""
REDUCTION = 1e-5
"""Relative error of float32 sums in another order over 40 steps."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def forty_steps(tiny: Build) -> RunConfig:
    """Every average, mostly clipped gradients, and an evaluation that divides over no processes."""
    config: RunConfig = tiny(
        train__max_steps=40,
        train__micro_batch=2,
        optimizer={"lr": 3e-3, "grad_clip": 0.3},
        schedule={"name": "constant", "warmup_steps": 5},
        checkpoint={"snapshot_every": 4, "state_every": 20},
        averages=EVERY_AVERAGE,
        eval={"every": 10, "batch": 3},
        log={"every": 1},
    )
    return config


@pytest.fixture(scope="module")
def alone(forty_steps: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of one process."""
    run = quiet(forty_steps, tmp_path_factory.mktemp("alone") / "run")
    assert sum(event.get("grad_norm", 0.0) > 0.3 for event in events(run)) > 20
    return run


def with_train(config: RunConfig, **settings: Any) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})


def assert_agree(one: RunFolder, other: RunFolder) -> None:
    """Check events and folders; losses and norms up to the error of a reduction."""
    assert_same_events(events(one), events(other))
    folders = [
        {path.relative_to(run.path) for path in run.path.rglob("model.safetensors")}
        for run in (one, other)
    ]
    assert folders[0] == folders[1]


def assert_same_events(expected: list[dict[str, Any]], got: list[dict[str, Any]]) -> None:
    assert [event.keys() for event in got] == [event.keys() for event in expected]
    for there, here in zip(expected, got, strict=True):
        for key, value in there.items():
            # Terms of the norm may cancel, which increases its relative error.
            error = 100 * REDUCTION if key == "grad_norm" else REDUCTION
            assert here[key] == (value and pytest.approx(value, rel=error)), (there["step"], key)


def last_state(run: RunFolder) -> dict[str, bytes]:
    return bits(list(step_folders(run.states).values())[-1])


def bits(state: Path) -> dict[str, bytes]:
    """Return the bytes of every whole tensor: the spike history contains NaN."""
    return {name: tensor.numpy().tobytes() for name, tensor in read_tensors(state, {}).items()}


def different(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return [name for name in one | other if one.get(name) != other.get(name)]


# --- the same training --------------------------------------------------------------------------


@pytest.mark.parametrize(("parallel", "size", "machines"), SPREADS)
def test_the_loss_curve_equals_that_of_one_process(
    forty_steps: RunConfig,
    alone: RunFolder,
    tmp_path: Path,
    parallel: str,
    size: int,
    machines: int,
) -> None:
    config = with_train(forty_steps, parallel=parallel)
    train_together(size, config, tmp_path / "run", machines)
    assert_agree(alone, RunFolder(tmp_path / "run"))


def compiled_graphs(config: RunConfig, folder: Path) -> int:
    """Train and return the number of parts that DDP splits the graph into."""
    from torch._dynamo.utils import counters

    pretrain(config, folder, log=lambda line: None, warn=pytest.fail)
    assert counters["stats"]["unique_graphs"] == 1  # the dummy pass uses the graph of the steps
    return int(counters["aot_autograd"]["total"])


def test_compiled_ddp_has_a_graph_per_gradient_bucket(tiny: Build, tmp_path: Path) -> None:
    """The first bucket is full after 1 MB of gradients, so its reduction overlaps the rest."""
    wide = {"n_layer": 3, "n_head": 2, "n_embd": 160, "vocab_size": 257}
    shape = {"model": wide, "train__micro_batch": 2, "log": {"every": 1}}
    graphs = in_processes(
        2, compiled_graphs, tiny(**shape, train__compile=True), tmp_path / "compiled"
    )
    assert graphs[0] == graphs[1] > 1
    train_together(2, tiny(**shape, train__compile=False), tmp_path / "eager")
    losses = [
        [event["loss"] for event in events(RunFolder(tmp_path / name)) if "loss" in event]
        for name in ("compiled", "eager")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def train_where_the_second_cannot_compile(config: RunConfig, folder: Path) -> list[str]:
    """Train and return the warnings."""

    def compile_here(function: Any, **options: Any) -> Any:
        def fails(*inputs: Any) -> Any:
            raise NotImplementedError("not on this machine")

        return fails if os.environ["RANK"] == "1" else function

    warnings: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compile_here)
        pretrain(config, folder, log=lambda line: None, warn=warnings.append)
    return warnings


def test_if_one_process_cannot_compile_all_train_uncompiled(tiny: Build, tmp_path: Path) -> None:
    config = tiny(train__compile=True, train__micro_batch=2)
    warned = in_processes(2, train_where_the_second_cannot_compile, config, tmp_path / "run")
    assert warned == [["torch.compile failed (on another process): training uncompiled"], []]
    train_together(2, with_train(config, compile=False), tmp_path / "eager")
    assert events(RunFolder(tmp_path / "run")) == events(RunFolder(tmp_path / "eager"))


def refusal_of_cuda_graphs(config: RunConfig, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        pretrain(config, folder, log=lambda line: None)
    return f"{caught.value}; {caught.value.hint}"


def test_cuda_graphs_need_a_single_process(tiny: Build, tmp_path: Path) -> None:
    config = tiny(train__compile="cuda-graphs", train__micro_batch=2)
    output = in_processes(2, refusal_of_cuda_graphs, config, tmp_path / "run")
    expected = "train.compile: cuda-graphs needs a single process with whole weights"
    assert output == [f"{expected}; --set train.compile=true"] * 2
    assert not (tmp_path / "run").exists()


def first_weights(config: RunConfig) -> dict[str, npt.NDArray[np.float32]]:
    with init_distributed(CPU, spread=True) as (world, device):
        model = build_model(config, "fsdp", world, device, "float32")
        parameters = dict(model.named_parameters())
        assert all(to_local(p).numel() < p.numel() for p in parameters.values())
        gathered = gather_on_rank_zero(
            parameters, {name: to_local(p.detach()) for name, p in parameters.items()}
        )
        return {name: tensor.numpy() for name, tensor in gathered.items()}


def test_sharded_initial_weights_equal_whole_ones(tiny: Build) -> None:
    """With three processes, no tensor divides evenly."""
    config = tiny()
    expected = GPT(config.model, config.data.block_size, config.seed).state_dict()
    made = in_processes(3, first_weights, config)
    assert made[1:] == [{}, {}]
    assert made[0].keys() == expected.keys()
    assert all(np.array_equal(made[0][name], tensor.numpy()) for name, tensor in expected.items())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activation_checkpointing_changes_no_bit(
    tiny: Build, tmp_path: Path, dropout: float
) -> None:
    model = tiny().model.model_copy(update={"dropout": dropout}).model_dump()
    kept = quiet(tiny(model=model), tmp_path / "kept")
    config = tiny(model=model, train__activation_checkpointing=True)
    assert_same_run(kept, quiet(config, tmp_path / "recomputed"))


@pytest.mark.parametrize(
    ("changes", "size", "message", "hint"),
    [
        ({}, 3, "batch_sequences 8 .* by 3 processes: try 6 or 9", "batch_sequences=9"),
        ({}, 16, "batch_sequences 8 .* by 16 processes: try 16", "batch_sequences=16"),
        ({}, 4, "2 sequences for .* by train.micro_batch 4: try 2", "micro_batch=2"),
        (
            {"batch_sequences": None, "batch_tokens": 128},
            5,
            "batch_tokens 128 .* by 5 processes: try 80 or 160",
            "batch_tokens=160",
        ),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(
    tiny: Build, changes: dict[str, Any], size: int, message: str, hint: str
) -> None:
    config = tiny(train=tiny().train.model_dump() | changes)
    with pytest.raises(UserError, match=message) as caught:
        resolve_parallel(config, World(size=size), CPU, "float32")
    assert hint in caught.value.hint


# --- states -------------------------------------------------------------------------------------


def test_any_number_of_processes_resumes_from_any_other(
    forty_steps: RunConfig, alone: RunFolder, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    parts = [("fsdp", 4, 8), ("ddp", 2, 16), ("auto", 1, 24), ("hsdp", 4, 32), ("fsdp", 2, 40)]
    for parallel, size, steps in parts:
        config = with_train(forty_steps, parallel=parallel, max_steps=steps)
        if size == 1:
            quiet(config, run)
        else:
            train_together(size, config, run, machines=2 if parallel == "hsdp" else 1)
    extra = {"val/loss"}  # each part ends with an evaluation
    ours = [e for e in events(RunFolder(run)) if e["step"] % 10 == 0 or not extra & e.keys()]
    assert_same_events(events(alone), ours)


def test_resharding_a_checkpoint_keeps_every_bit(forty_steps: RunConfig, tmp_path: Path) -> None:
    """Each branch reads and saves it again, and stops before its first step."""
    train_together(4, with_train(forty_steps, parallel="fsdp", max_steps=8), tmp_path / "4")
    expected = last_state(RunFolder(tmp_path / "4"))
    assert len(list((tmp_path / "4/state/step-00000008").glob("*.safetensors"))) == 4
    before = tmp_path / "4/state/step-00000008"
    for number, (parallel, size) in enumerate([("ddp", 2), ("fsdp", 3), ("auto", 1), ("fsdp", 2)]):
        # Nothing is trained, so the batch need not divide.
        config = with_train(forty_steps, parallel=parallel, batch_sequences=12)
        folder = tmp_path / f"{number}"
        options = {"resume": before, "max_seconds": 0.0}
        for result in in_processes(size, train, config, folder, options):
            assert result == 8, result
        before = folder / "state" / "step-00000008"
        assert integrity_problems(before) == []
        assert different(expected, bits(before)) == []


def read_from_a_bad_disk(state: Path) -> str:
    import llmtrain.training.checkpoint as module

    def bad(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if os.environ["RANK"] == "1":
        module.HuggingFaceStorageReader.read_data = bad
    with init_distributed(CPU, spread=False):
        try:
            read_tensors(state, {})
        except OSError as error:
            return str(error)
    return "nothing failed"


def test_a_read_error_of_one_process_is_raised_on_all(alone: RunFolder) -> None:
    [*_, newest] = step_folders(alone.states).values()
    output = in_processes(2, read_from_a_bad_disk, newest)
    assert all("Input/output error" in each for each in output), output


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_interrupted_processes_resume_exactly(
    tiny: Build, tmp_path: Path, parallel: str
) -> None:
    model = tiny().model.model_copy(update={"dropout": 0.1}).model_dump()
    config = tiny(
        model=model,
        averages=EVERY_AVERAGE,
        train__max_steps=24,
        train__parallel=parallel,
        log={"every": 1},
    )
    # The machine's speed decides where it stops, but not the result.
    for folder, seconds in (("whole", [None]), ("parts", [0.0, 0.3, None])):
        for limit in seconds:
            options = {} if limit is None else {"max_seconds": limit}
            for result in in_processes(2, train, config, tmp_path / folder, options):
                assert isinstance(result, int), result
    whole_run, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    assert different(last_state(whole_run), last_state(parts)) == []
    assert events(whole_run) == events(parts)
    for path in whole_run.path.rglob("model.safetensors"):
        assert path.read_bytes() == (parts.path / path.relative_to(whole_run.path)).read_bytes()


def train_until(config: RunConfig, folder: Path, check: int) -> int:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, check)
        return train(config, folder, {})


def test_an_interrupted_evaluation_restores_the_sharded_weights(
    tiny: Build, tmp_path: Path
) -> None:
    config = tiny(
        train__parallel="fsdp", train__max_steps=4, eval={"every": 4, "batch": 1, "tokens": 65}
    )
    train_together(2, config, tmp_path / "whole")
    # Four steps, two batches with the weights, one with the average; stopped at the second.
    assert in_processes(2, train_until, config, tmp_path / "cut", 6) == [4, 4]
    whole_run, cut = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    assert [event for event in events(cut) if "val/loss" in event] == []
    assert different(last_state(whole_run), last_state(cut)) == []


def train_on_a_full_disk(config: RunConfig, folder: Path) -> str:
    import llmtrain.training.checkpoint_writer as module

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if os.environ["RANK"] == "1":
        module.HuggingFaceStorageWriter.write_data = full
    try:
        train(config, folder, {})
    except WriteFailed as error:
        return str(error)
    return "nothing failed"


def test_a_write_error_of_one_process_leaves_no_checkpoint(tiny: Build, tmp_path: Path) -> None:
    output = in_processes(2, train_on_a_full_disk, tiny(train__parallel="fsdp"), tmp_path / "run")
    assert all("cannot write" in each and "No space left" in each for each in output), output
    assert list((tmp_path / "run" / "state").iterdir()) == []


# --- processes that a launcher watches ----------------------------------------------------------


@pytest.mark.gpu
def test_sharded_training_on_one_gpu_equals_plain_training(tiny: Build, tmp_path: Path) -> None:
    plain, spread = (
        quiet(
            tiny(
                train__max_steps=3, train__device="cuda", train__parallel=parallel, log={"every": 1}
            ),
            tmp_path / parallel,
        )
        for parallel in ("auto", "fsdp")
    )
    for there, here in zip(events(plain), events(spread), strict=True):
        assert here == pytest.approx(there, rel=1e-4)
