"""Weight decay, SPAM, clipping and skipped updates against plain loops of torch."""

from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.config.schema import ModelConfig, OptimizerConfig, SpamConfig
from llmtrain.model.gpt import GPT
from llmtrain.training.optimizers import adamw, build_optimizer
from llmtrain.training.optimizers.adamw import decayed_parameters
from llmtrain.training.optimizers.muon import Muon
from llmtrain.training.optimizers.spam import SETTLE_STEPS, Spam


def model() -> GPT:
    return GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=50, bias=True), 8, seed=1)


def test_the_rule_of_the_paper_excludes_embeddings() -> None:
    linear = decayed_parameters(model(), "linear")
    assert "transformer.h.0.attn.c_attn.weight" in linear
    assert len(linear) == 2 * 4
    assert decayed_parameters(model(), "matrices") == linear | {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }


def test_decay_acts_on_those_weights_only() -> None:
    trained = model()
    config = OptimizerConfig(lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer(trained, config)
    before = {name: p.detach().clone() for name, p in trained.named_parameters()}
    for parameter in trained.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in trained.named_parameters():
        factor = 1 - 0.1 * 0.5 if name in decayed_parameters(trained, "linear") else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_every_parameter_is_in_one_group() -> None:
    trained = model()
    grouped = [
        p
        for group in build_optimizer(trained, OptimizerConfig()).param_groups
        for p in group["params"]
    ]
    assert {id(p) for p in grouped} == {id(p) for p in trained.parameters()}
    assert len(grouped) == len(list(trained.parameters()))


def test_spam_equals_a_float64_oracle() -> None:
    """Gradients that spike by 1e4, over two resets, with AdamW's weight decay and epsilon."""
    spam = SpamConfig(threshold=50.0, reset_every=40, reset_warmup=0)
    config = OptimizerConfig(name="spam", lr=1e-2, weight_decay=0.1, spam=spam)
    linear = torch.nn.Linear(4, 3, bias=False)
    optimizer = build_optimizer(torch.nn.Sequential(linear), config)
    assert isinstance(optimizer, Spam)
    random = np.random.default_rng(0)
    weight = linear.weight.detach().double().numpy().copy()
    first, second, updates = np.zeros_like(weight), np.zeros_like(weight), 0
    for step in range(1, 101):
        gradient = random.normal(size=weight.shape)
        if step % 9 == 0:
            gradient[1, 2] *= 1e4
        since = (step - 1) % 40
        if since == 0:
            first, second, updates = np.zeros_like(weight), np.zeros_like(weight), 0
        linear.weight.grad = torch.from_numpy(gradient).float()
        if since >= SETTLE_STEPS:
            limit = np.sqrt(50.0 * second)
            gradient = np.clip(gradient, -limit, limit)
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
        updates += 1
        scaled = (first / (1 - 0.9**updates)) / (np.sqrt(second / (1 - 0.95**updates)) + 1e-8)
        weight = weight * (1 - 1e-2 * 0.1) - 1e-2 * scaled
        optimizer.clip_spikes(step)
        optimizer.step()
    np.testing.assert_allclose(linear.weight.detach().numpy(), weight, rtol=1e-4, atol=1e-5)


def test_spam_clips_only_finite_gradients_with_a_history() -> None:
    """A NaN remains, so the detector sees it; a weight without a history is not frozen."""
    linear = torch.nn.Linear(2, 1, bias=False)
    optimizer = build_optimizer(linear, OptimizerConfig(name="spam", spam=SpamConfig()))
    assert isinstance(optimizer, Spam)
    linear.weight.grad = torch.tensor([[1.0, 0.0]])
    optimizer.step()
    linear.weight.grad = torch.tensor([[torch.nan, 7.0]])
    optimizer.clip_spikes(SETTLE_STEPS + 1)
    assert linear.weight.grad[0, 0].isnan()
    assert linear.weight.grad[0, 1] == 7.0


def test_found_inf_skips_an_update() -> None:
    """torch's fused AdamW reads it; the moments and the step count also stay."""
    trained = model()
    optimizer = build_optimizer(trained, OptimizerConfig())
    for skip in (0.0, 1.0):
        before = [p.detach().clone() for p in trained.parameters()]
        moments = [{k: v.clone() for k, v in state.items()} for state in optimizer.state.values()]
        for parameter in trained.parameters():
            parameter.grad = torch.full_like(parameter, torch.nan if skip else 1.0)
        optimizer.found_inf = torch.tensor(skip)
        optimizer.step()
        after = list(trained.parameters())
        assert all(torch.equal(b, a) == bool(skip) for b, a in zip(before, after, strict=True))
    for state, saved in zip(optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(state[key], saved[key]) for key in saved)


SPAM = {"reset_every": 30, "reset_warmup": 0}
OPTIMIZERS: list[dict[str, Any]] = [{}, {"name": "spam", "spam": SPAM}, {"name": "muon"}]


def filled(trained: GPT, seed: int, size: float) -> None:
    random = torch.Generator().manual_seed(seed)
    for parameter in trained.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=random)


@pytest.fixture(params=[(), ("cpu",)], ids=["fused", "unfused"])
def scaling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test both ways: scaling in the kernel, and before it."""
    monkeypatch.setattr(adamw, "_NO_FUSED_SCALING", request.param)


@pytest.mark.usefixtures("scaling")
@pytest.mark.parametrize("keys", OPTIMIZERS, ids=["adamw", "spam", "muon"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_clipped_update_equals_torchs_clipping(keys: dict[str, Any], clip: float) -> None:
    """Forty steps with norms between 0.1 and 1,000; equal up to a few float32 roundings."""
    config = OptimizerConfig.model_validate(keys)
    ours, torchs = model(), model()
    one, other = build_optimizer(ours, config), build_optimizer(torchs, config)
    for each in (one, other):
        if isinstance(each, Muon):
            each.precision = torch.float32  # bfloat16 would enlarge rounding differences
    for step in range(1, 41):
        for each in (ours, torchs):
            filled(each, seed=step, size=10.0 ** (step % 5 - 3))
        norm = one.gradient_norm()
        one.update(step, norm, clip=clip, skip=torch.tensor(False))
        assert all(parameter.grad is None for parameter in ours.parameters())
        if isinstance(other, Spam):
            other.clip_spikes(step)
        before = torch.nn.utils.clip_grad_norm_(torchs.parameters(), clip or torch.inf)
        if not isinstance(other, Spam):
            torch.testing.assert_close(norm, before, rtol=1e-6, atol=0.0)
        other.step()
    for mine, theirs in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("scaling")
@pytest.mark.parametrize("keys", OPTIMIZERS, ids=["adamw", "spam", "muon"])
@pytest.mark.parametrize("size", [1.0, torch.nan, torch.inf])
def test_a_skipped_update_keeps_weights_and_moments(keys: dict[str, Any], size: float) -> None:
    trained = model()
    optimizer = build_optimizer(trained, OptimizerConfig.model_validate(keys))
    for step, skip in ((1, False), (2, True)):
        before = [p.detach().clone() for p in trained.parameters()]
        moments = [{k: v.clone() for k, v in state.items()} for state in optimizer.state.values()]
        filled(trained, seed=step, size=size if skip else 1.0)
        optimizer.update(step, optimizer.gradient_norm(), clip=1.0, skip=torch.tensor(skip))
        after = list(trained.parameters())
        assert all(torch.equal(b, a) == skip for b, a in zip(before, after, strict=True))
    for state, saved in zip(optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(state[key], saved[key]) for key in saved)
