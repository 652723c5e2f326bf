"""GPT against transformers' GPT-2, and its initialization."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from llmtrain.checkpoints.checkpoint import Origin
from llmtrain.checkpoints.gpt2_folder import Shape, load_model, save_weights
from llmtrain.config.schema import ModelConfig
from llmtrain.errors import UserError
from llmtrain.model.gpt import GPT, IGNORE

OPTIONS = list(itertools.product([False, True], [False, True]))


def perturbed(config: ModelConfig) -> GPT:
    """Return a model with noise on all parameters, including biases and norms."""
    model = GPT(config, block_size=24, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def pair(folder: Path, *, bias: bool, scaled: bool) -> tuple[GPT, GPT2LMHeadModel]:
    config = ModelConfig(
        n_layer=3,
        n_head=4,
        n_embd=32,
        vocab_size=100,
        bias=bias,
        scale_attn_by_inverse_layer_idx=scaled,
    )
    model = perturbed(config)
    folder.mkdir(exist_ok=True)
    save_weights(folder, model.state_dict(), Shape(config, 24, 99), Origin(1, 1, 0.1, "test"))
    return model, AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(("bias", "scaled"), OPTIONS)
def test_logits_equal_transformers(tmp_path: Path, bias: bool, scaled: bool) -> None:
    model, reference = pair(tmp_path, bias=bias, scaled=scaled)
    tokens = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval().logits(tokens), reference.eval()(tokens).logits, atol=1e-4, rtol=0
        )
        assert torch.equal(load_model(tmp_path).logits(tokens), model.logits(tokens))


@pytest.mark.parametrize(("bias", "scaled"), OPTIONS)
def test_gradients_equal_transformers(tmp_path: Path, bias: bool, scaled: bool) -> None:
    model, reference = pair(tmp_path, bias=bias, scaled=scaled)
    reference.eval()
    windows = torch.randint(0, 100, (2, 25), generator=torch.Generator().manual_seed(2))
    loss = model(windows[:, :-1], windows[:, 1:])
    loss.backward()
    expected = F.cross_entropy(
        reference(windows[:, :-1]).logits.flatten(0, 1), windows[:, 1:].flatten()
    )
    expected.backward()
    torch.testing.assert_close(loss, expected)
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        other = theirs[name].grad
        assert other is not None
        assert parameter.grad is not None
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            other = other.t()
        torch.testing.assert_close(parameter.grad, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("layers", "heads", "width", "millions"),
    [(12, 12, 768, 124.44), (24, 16, 1024, 354.82), (36, 20, 1280, 774.03)],
)
def test_published_parameter_counts(layers: int, heads: int, width: int, millions: float) -> None:
    config = ModelConfig(n_layer=layers, n_head=heads, n_embd=width, vocab_size=50257, bias=True)
    with torch.device("meta"):
        model = GPT(config, block_size=1024)
    assert model.n_parameters() / 1e6 == pytest.approx(millions, abs=0.01)


def test_ignored_targets_have_no_effect() -> None:
    model = perturbed(ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=50))
    tokens = torch.randint(0, 50, (1, 20))
    targets = tokens.clone()
    targets[:, 10:] = IGNORE
    torch.testing.assert_close(model(tokens, targets), model(tokens[:, :10], tokens[:, :10]))


def test_initialization_depends_on_the_seed_only() -> None:
    config = ModelConfig(n_layer=8, n_head=2, n_embd=128, vocab_size=500, bias=True)
    one, two = GPT(config, 32, seed=5), GPT(config, 32, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    projection = torch.cat([block.mlp.c_proj.weight.flatten() for block in one.transformer.h])
    assert projection.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert not any(p.any() for name, p in one.named_parameters() if name.endswith("bias"))


def test_dropout_is_inactive_in_eval_mode() -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=50, dropout=0.5), 8, seed=1)
    tokens = torch.randint(0, 50, (1, 8))
    assert not torch.equal(model.logits(tokens), model.logits(tokens))
    model.eval()
    assert torch.equal(model.logits(tokens), model.logits(tokens))


@pytest.mark.parametrize(
    ("key", "value"),
    [("activation_function", "relu"), ("layer_norm_epsilon", 0.1), ("scale_attn_weights", False)],
)
def test_unsupported_architecture_is_rejected(tmp_path: Path, key: str, value: object) -> None:
    pair(tmp_path, bias=True, scaled=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=key):
        load_model(tmp_path)


def test_sharded_weights_are_loaded(tmp_path: Path) -> None:
    model, reference = pair(tmp_path / "whole", bias=True, scaled=True)
    reference.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    loaded = load_model(tmp_path / "shards")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../whole/model.safetensors"}}))
    with pytest.raises(UserError, match=r"not the name of a \.safetensors file"):
        load_model(tmp_path / "shards")
