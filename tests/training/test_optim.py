"""Which weights decay, and one step against torch's own AdamW in a plain loop."""

import torch

from llmtrain.config import ModelConfig, OptimizerConfig
from llmtrain.model import GPT
from llmtrain.training.optim import build_optimizer, decayed_parameters


def model() -> GPT:
    return GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=50, bias=True), 8, seed=1)


def test_the_papers_rule_leaves_out_embeddings() -> None:
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
        p for group in build_optimizer(trained, OptimizerConfig()).param_groups for p in group["params"]
    ]
    assert {id(p) for p in grouped} == {id(p) for p in trained.parameters()}
    assert len(grouped) == len(list(trained.parameters()))
