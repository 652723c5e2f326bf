"""Compiled training and CUDA graphs equal eager training, also after a resume."""

from pathlib import Path

import pytest
import torch
from tiny_training import Build, assert_same_run, events, interrupt_at, quiet

import llmtrain.training.worker as worker
from llmtrain.runtime.signals import Interrupted


@pytest.mark.slow
def test_a_compiled_run_resumes_exactly_after_the_block_warmup(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each session compiles again, like a separate process."""
    config = tiny(
        model={"n_layer": 1, "n_head": 2, "n_embd": 64, "vocab_size": 264},
        data__block_size=64,
        data__block_warmup={"start": 16, "steps": 8},
        train__compile=True,
        averages=[],
        eval={"every": 40, "batch": 64},
    )
    whole = quiet(config, tmp_path / "whole")
    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 20)
        with pytest.raises(Interrupted):
            quiet(config, tmp_path / "parts")
    torch._dynamo.reset()
    assert_same_run(whole, quiet(config, tmp_path / "parts"))


@pytest.mark.slow
def test_compiled_training_equals_eager(tiny: Build, tmp_path: Path) -> None:
    warnings: list[str] = []
    runs = [
        quiet(tiny(train__compile=c), tmp_path / str(c), warn=warnings.append)
        for c in (False, True)
    ]
    assert warnings == []
    losses = [[e["loss"] for e in events(run) if "loss" in e] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_cuda_graphs_on_a_cpu_change_nothing(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch ignores them on a CPU; the warm-up passes and zero gradients remain."""
    monkeypatch.setattr(worker, "resolve_compile", lambda setting, device: (True, None))
    runs = [
        quiet(tiny(train__compile=c), tmp_path / str(c), warn=pytest.fail)
        for c in (True, "cuda-graphs")
    ]
    assert [e for e in events(runs[0]) if "loss" in e] == [
        e for e in events(runs[1]) if "loss" in e
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_cuda_graphs_give_the_losses_of_compiled_code(
    tiny: Build, tmp_path: Path, dropout: float
) -> None:
    """With several micro-batches per step (pytorch/pytorch#96693) and after a resume."""
    shared = {
        "model__dropout": dropout,
        "train__device": "cuda",
        "train__micro_batch": 2,
        "log": {"every": 1},
    }
    plain = quiet(tiny(**shared, train__compile=True), tmp_path / "plain", warn=pytest.fail)
    graphs = tiny(**shared, train__compile="cuda-graphs")
    quiet(
        graphs.model_copy(update={"train": graphs.train.model_copy(update={"max_steps": 8})}),
        tmp_path / "run",
    )
    run = quiet(graphs, tmp_path / "run", warn=pytest.fail)
    curves = [[e["loss"] for e in events(each) if "loss" in e] for each in (plain, run)]
    assert len(curves[0]) == 12
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
