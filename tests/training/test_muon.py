"""Muon: compared with torch's, skipped, interrupted, sharded, and refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import Build, assert_same_run, events, interrupt_at, quiet
from torch import Tensor, nn
from worlds import train_together

from llmtrain.config.schema import ModelConfig, OptimizerConfig, RunConfig
from llmtrain.errors import UserError
from llmtrain.model.gpt import GPT
from llmtrain.runtime.signals import Interrupted
from llmtrain.storage.run_folder import RunFolder
from llmtrain.training.optimizers import build_optimizer
from llmtrain.training.optimizers.muon import Muon, orthogonalize

REDUCTION = 1e-4
"""Relative error of sums in another order, rounded to bfloat16, over 16 steps."""


def muon(model: nn.Module, **settings: Any) -> Muon:
    optimizer = build_optimizer(model, OptimizerConfig.model_validate({"name": "muon"} | settings))
    assert isinstance(optimizer, Muon)
    return optimizer


def small(seed: int = 1) -> GPT:
    return GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=50, bias=True), 8, seed=seed)


def bits(tensors: list[Tensor]) -> list[bytes]:
    return [tensor.detach().numpy().tobytes() for tensor in tensors]


@settings(max_examples=25)
@given(
    st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e6])
)  # fmt: skip
def test_orthogonalize_keeps_singular_vectors(
    rows: int, columns: int, seed: int, size: float
) -> None:
    """The singular values of a non-degenerate matrix come near 1."""
    random = torch.Generator().manual_seed(seed)
    u, _, vt = torch.linalg.svd(torch.randn(rows, columns, generator=random), full_matrices=False)
    values = torch.rand(min(rows, columns), generator=random) * 0.9 + 0.1
    left = u.T @ orthogonalize(size * (u * values) @ vt) @ vt.T
    assert (left - left.diag().diag()).abs().max() < 1e-3
    assert left.diag().min() > 0.6
    assert left.diag().max() < 1.3


def references(model: GPT, config: OptimizerConfig) -> tuple[dict[str, list[Tensor]], list[Any]]:
    """Return copies of the parameters, with Q, K and V separate, and torch's two optimizers."""
    pieces: dict[str, list[Tensor]] = {}
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        of_linear = parameter.dim() == 2 and name.startswith("transformer.h.")
        parts = parameter.detach().chunk(3 if name.endswith("c_attn.weight") else 1)
        pieces[name] = [part.clone().requires_grad_() for part in parts]
        (matrices if of_linear else others).extend(pieces[name])
    assert config.muon is not None
    by_muon = torch.optim.Muon(
        matrices, lr=config.lr, weight_decay=config.weight_decay, momentum=config.muon.momentum,
        nesterov=config.muon.nesterov, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    by_adamw = torch.optim.AdamW(
        others, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=True
    )
    return pieces, [by_muon, by_adamw]


@pytest.mark.parametrize("keys", [{}, {"momentum": 0.8, "nesterov": False}])
def test_steps_equal_those_of_torch(keys: dict[str, Any]) -> None:
    """Ten steps of torch.optim.Muon for the blocks and AdamW for the rest, in bfloat16."""
    config = OptimizerConfig.model_validate({"name": "muon", "lr": 0.02, "muon": keys})
    model = small()
    optimizer = muon(model, lr=0.02, muon=keys)
    optimizer.precision = torch.bfloat16
    pieces, theirs = references(model, config)
    random = torch.Generator().manual_seed(3)
    for step in range(10):
        for group in optimizer.param_groups + theirs[0].param_groups + theirs[1].param_groups:
            group["lr"] = 0.02 / (step + 1)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=random)
            for part, gradient in zip(
                pieces[name], parameter.grad.chunk(len(pieces[name])), strict=True
            ):
                part.grad = gradient.clone()
        optimizer.step()
        for each in theirs:
            each.step()
    for name, parameter in model.named_parameters():
        assert bits([parameter]) == bits([torch.cat(pieces[name])]), name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -3e38, 1.0])
def test_a_skipped_update_changes_no_bit(bad: float) -> None:
    model = small()
    optimizer = muon(model)
    for skip in (0.0, 1.0, 0.0):
        kept = [tensor for state in optimizer.state.values() for tensor in state.values()]
        before = bits([*model.parameters(), *kept])
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, bad if skip else 1e-3)
        optimizer.found_inf = torch.tensor(skip)
        optimizer.step()
        after = bits([*model.parameters(), *kept])
        assert [a == b for a, b in zip(after, before, strict=True)] == [bool(skip)] * len(before)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_learning_rate_and_weight_decay_apply_to_both_kinds() -> None:
    """The RMS of an update is about a fifth of the rate for every shape, as in AdamW."""
    model = small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = muon(model, lr=0.1, weight_decay=0.5)
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name.startswith("transformer.h."):
            moved = parameter - before[name] * (1 - 0.1 * 0.5)
            assert moved.square().mean().sqrt().item() == pytest.approx(0.2 * 0.1, rel=0.2), name
    assert {group["weight_decay"] for group in optimizer.param_groups if not group["stacked"]} == {
        0.0
    }


# --- in training --------------------------------------------------------------------------------


def training(tiny: Build, **overrides: Any) -> RunConfig:
    common = {
        "optimizer": {"name": "muon", "lr": 1e-2},
        "train__max_steps": 16,
        "log": {"every": 1},
    }
    config: RunConfig = tiny(**common | overrides)
    return config


@pytest.fixture(scope="module")
def alone(tiny: Build, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of one process."""
    return quiet(training(tiny), tmp_path_factory.mktemp("alone") / "run")


@pytest.mark.slow
def test_a_run_interrupted_at_every_step_resumes_exactly(
    tiny: Build, tmp_path: Path, alone: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = 0
    for _ in range(16):
        with monkeypatch.context() as patch:
            interrupt_at(patch, 3)  # in the first micro-batch of the next step
            try:
                quiet(training(tiny), tmp_path / "parts")
            except Interrupted:
                sessions += 1
    assert sessions >= 14
    assert_same_run(alone, quiet(training(tiny), tmp_path / "parts"))


def assert_agree(one: RunFolder, other: RunFolder) -> None:
    theirs, ours = ([e["loss"] for e in events(run) if "loss" in e] for run in (one, other))
    assert ours == pytest.approx(theirs, rel=REDUCTION)


@pytest.mark.slow
def test_sharded_and_replicated_runs_resume_from_each_other(
    tiny: Build, tmp_path: Path, alone: RunFolder
) -> None:
    """FSDP with two processes, a single process, DDP with two, HSDP on two machines."""
    run = tmp_path / "run"
    for parallel, size, steps in (("fsdp", 2, 5), ("auto", 1, 8), ("ddp", 2, 12), ("hsdp", 4, 16)):
        config = training(
            tiny,
            train__parallel=parallel,
            train__max_steps=steps,
            train__micro_batch=8 // max(size, 2),
        )
        if size == 1:
            quiet(config, run)
        else:
            train_together(size, config, run, machines=2 if parallel == "hsdp" else 1)
    assert_agree(alone, RunFolder(run))


@pytest.mark.slow
def test_a_branch_cannot_change_between_adamw_and_muon(
    tiny: Build, tmp_path: Path, alone: RunFolder
) -> None:
    adamw = quiet(tiny(train__max_steps=4), tmp_path / "adamw")
    changed = training(tiny, optimizer={"name": "muon", "lr": 5e-3, "muon": {"momentum": 0.9}})
    assert quiet(changed, tmp_path / "branch", resume=alone.state(12)).snapshot(16).exists()
    for config, state in (
        (training(tiny), adamw.state(4)),
        (tiny(train__max_steps=16), alone.state(12)),
    ):
        with pytest.raises(UserError, match="Muon has other moments than AdamW"):
            quiet(config, tmp_path / "other", resume=state)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"muon": {"momentum": 0.9}}, "the section muon has no effect with name: adamw"),
        ({"name": "spam", "muon": {}}, "the section muon has no effect with name: spam"),
        ({"name": "muon", "spam": {}}, "the section spam has no effect with name: muon"),
        ({"name": "muon", "muon": {"momentum": 1.0}}, "less than 1"),
        ({"name": "muon", "muon": {"steps": 5}}, "Extra inputs"),
    ],
)
def test_conflicting_keys_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig.model_validate(values)
