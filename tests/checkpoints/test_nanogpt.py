"""Files of nanoGPT, its forks and build-nanogpt, compared with a copy of nanoGPT's computation."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from in_process import invoke
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmtrain.checkpoints.gpt2_folder import load_model
from llmtrain.checkpoints.open import open_checkpoint
from llmtrain.config.schema import ModelConfig
from llmtrain.model.gpt import GPT

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 97}
ARGUMENTS = SIZES | {"block_size": 16, "bias": False, "dropout": 0.0}
TOKENS = torch.arange(16).view(1, 16)
AVERAGE = ("average", "s", "--every", "10", "--window", "2", "--out", "out")


@dataclasses.dataclass
class GPTConfig:
    """Configuration object in files of build-nanogpt."""

    block_size: int = 16
    vocab_size: int = 97
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 32


def state_at(step: int, *, bias: bool = False) -> dict[str, Tensor]:
    """Return large weights, so that both forms of GELU differ, with a tied output layer."""
    generator = torch.Generator().manual_seed(7)
    state = GPT(ModelConfig(**SIZES, bias=bias), 16, seed=1).state_dict()
    state = {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) + 0.001 * step
        for name, tensor in state.items()
    }
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def write_series(folder: Path, **document: object) -> list[dict[str, Tensor]]:
    folder.mkdir()
    bias = isinstance(document.get("config"), GPTConfig)
    states = [state_at(step, bias=bias) for step in (10, 20)]
    for step, state in zip((10, 20), states, strict=True):
        torch.save({"model": state, "iter_num": step} | document, folder / f"ckpt_{step}.pt")
    return states


def mean_state(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(s[name].double() for s in states).float() / 2 for name in states[0]}


def nanogpt_logits(state: dict[str, Tensor], *, approximate: str) -> Tensor:
    """Compute the logits like nanoGPT's model.py: pre-norm blocks, MLP with nn.GELU."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (32,), state[f"{name}.weight"], state.get(f"{name}.bias"))

    x = state["transformer.wte.weight"][TOKENS] + state["transformer.wpe.weight"]
    for layer in (f"transformer.h.{i}" for i in range(SIZES["n_layer"])):
        qkv = linear(norm(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn").split(32, dim=2)
        q, k, v = (part.view(1, 16, 2, 16).transpose(1, 2) for part in qkv)
        attention = q @ k.transpose(-2, -1) / math.sqrt(16)
        attention = attention.masked_fill(~torch.ones(16, 16).tril().bool(), -torch.inf)
        y = (attention.softmax(-1) @ v).transpose(1, 2).reshape(1, 16, 32)
        x = x + linear(y, f"{layer}.attn.c_proj")
        hidden = linear(norm(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc")
        x = x + linear(F.gelu(hidden, approximate=approximate), f"{layer}.mlp.c_proj")
    return F.linear(norm(x, "transformer.ln_f"), state["lm_head.weight"])


NANOGPT = {"model_args": ARGUMENTS, "config": {"learning_rate": 6e-4}}


@pytest.mark.parametrize(
    ("document", "activation"),
    [
        (NANOGPT, "gelu"),
        ({"model_args": ARGUMENTS}, "gelu"),
        ({"config": GPTConfig()}, "gelu_new"),
        (NANOGPT | {"activation_function": "gelu_new"}, "gelu_new"),
        ({"model_args": ARGUMENTS, "config": {}}, "gelu_new"),  # an earlier export of ours
    ],
)
def test_the_average_computes_what_its_trainer_computed(
    tmp_path: Path, document: dict[str, Any], activation: str
) -> None:
    states = write_series(tmp_path / "s", **document)
    outcome = invoke(*AVERAGE, cwd=tmp_path)
    assert outcome.code == 0, outcome
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["activation_function"] == activation
    exact, tanh = (
        nanogpt_logits(mean_state(states), approximate=kind) for kind in ("none", "tanh")
    )
    assert (exact - tanh).abs().max() > 1e-4
    expected = exact if activation == "gelu" else tanh
    with torch.no_grad():
        ours = load_model(tmp_path / "out").logits(TOKENS)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(TOKENS).logits
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)


def changed(document: dict[str, Any], **state: Tensor | None) -> dict[str, Any]:
    model = state_at(10) | state
    return {"model": {n: t for n, t in model.items() if t is not None}} | document


WPE, HEAD, MASK = "transformer.wpe.weight", "lm_head.weight", "transformer.h.0.attn.bias"
Q_NORM, EXTRA_LAYER = "transformer.h.0.attn.q_norm.weight", "transformer.h.2.ln_1.weight"


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (changed(NANOGPT, **{Q_NORM: torch.ones(16)}), f"{Q_NORM} is (16,), in a GPT-2 absent"),
        (changed(NANOGPT, **{WPE: None}), f"{WPE} is absent"),
        (changed(NANOGPT, **{WPE: torch.ones(8, 32)}), f"{WPE} is (8, 32), in a GPT-2 (16, 32)"),
        (changed(NANOGPT, **{HEAD: torch.ones(97, 32)}), f"{HEAD} is not tied"),
        (changed(NANOGPT, **{EXTRA_LAYER: torch.ones(32)}), f"{EXTRA_LAYER} is (32,)"),
        (changed({"model_args": ARGUMENTS | {"rope": True}}), "its settings include rope"),
        (changed({"model_args": ARGUMENTS | {"bias": True}}), "c_attn.bias is absent"),
        (changed({"model_args": ARGUMENTS | {"n_layer": 10**12}}), "fewer than 1,000,000,000,000"),
        (changed({"config": SIZES | {"block_size": 16}}), "does not record the activation"),
    ],
)
def test_a_fork_keeps_its_names_and_gets_no_config(
    tmp_path: Path, document: dict[str, Any], reason: str
) -> None:
    (tmp_path / "s").mkdir()
    for step in (10, 20):
        model = {name: tensor + step for name, tensor in document["model"].items()}
        if HEAD in model and torch.equal(model[HEAD], model["transformer.wte.weight"]):
            model[HEAD] = model["transformer.wte.weight"]
        torch.save(document | {"model": model}, tmp_path / "s" / f"ckpt_{step}.pt")
    outcome = invoke(*AVERAGE, cwd=tmp_path)
    assert outcome.code == 0, outcome
    (line,) = [line for line in outcome.stderr.splitlines() if "not a GPT-2" in line]
    assert reason in line
    assert not (tmp_path / "out" / "config.json").exists()
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() | {HEAD} == document["model"].keys() | {HEAD}
    name = "transformer.h.0.attn.c_attn.weight"
    torch.testing.assert_close(got[name], document["model"][name] + 15)  # not transposed


@pytest.mark.parametrize(
    "extra",
    [{}, {MASK: torch.ones(1, 1, 16, 16)}, {HEAD: None}, {HEAD: state_at(10)[HEAD].clone()}],
)
def test_masks_and_a_tied_head_do_not_matter(tmp_path: Path, extra: dict[str, Any]) -> None:
    torch.save(changed(NANOGPT, **extra), tmp_path / "ckpt.pt")
    checkpoint = open_checkpoint(tmp_path / "ckpt.pt", step=10)
    assert checkpoint.config is not None
    assert not {MASK, HEAD} & checkpoint.tensors.keys()


def test_a_nanogpt_average_is_evaluated_generated_from_and_exported(
    tmp_path: Path, data_folder: Path
) -> None:
    """Every command computes with the exact GELU; nanoGPT's format then needs no warning."""
    sizes = {"vocab_size": 257}  # so that the last id is the end-of-text token of bytes
    shape = ModelConfig(**SIZES | sizes, scale_attn_by_inverse_layer_idx=False)
    state = GPT(shape, 16, seed=1).state_dict()
    (tmp_path / "s").mkdir()
    for step in (10, 20):
        model = {name: tensor * (1 + step / 100) for name, tensor in state.items()}
        document = {"model": model, "model_args": ARGUMENTS | sizes, "iter_num": step}
        torch.save(document, tmp_path / "s" / f"ckpt_{step}.pt")
    assert invoke(*AVERAGE, cwd=tmp_path).code == 0
    for command in (
        ("eval", "out", "--data", data_folder, "--tokens", 100),
        ("generate", "out", "--prompt", "a", "--max-tokens", 3),
        ("export", "out", "--to", "nano", "--format", "nanogpt"),
    ):
        outcome = invoke(*map(str, command), cwd=tmp_path)
        assert outcome.code == 0, outcome
        assert "GELU" not in outcome.stderr
    exported = torch.load(tmp_path / "nano" / "ckpt.pt", weights_only=True)
    assert exported["activation_function"] == "gelu"
