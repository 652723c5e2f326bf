"""Checkpoints in torch's format: read without running code, averaged into safetensors."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from average_of_folder import assert_is_average, run
from oracles import average_of, ulps
from safetensors import safe_open
from tiny_runs import model_at
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from llmtrain.checkpoints.gpt2_folder import load_model
from llmtrain.config.schema import ModelConfig
from llmtrain.errors import UserError
from llmtrain.model.gpt import GPT


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_bin(folder: Path, model: dict[str, Tensor], *, shards: int = 1) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if shards == 1:
        torch.save(model, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for number in range(shards):
        filename = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = {name: model[name] for name in list(model)[number::shards]}
        torch.save(part, folder / filename)
        weight_map |= dict.fromkeys(part, filename)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 2])
def test_bin_files_are_averaged_into_safetensors(
    tmp_path: Path, shards: int, dtype: torch.dtype
) -> None:
    for step in (10, 20, 30):
        write_bin(tmp_path / "s" / f"step{step}", model_at(step, dtype), shards=shards)
    result = run(tmp_path / "s")
    assert_is_average(result.spec.target, [model_at(s, dtype) for s in (10, 20, 30)])
    assert len(list(result.spec.target.glob("model*.safetensors"))) == shards


def test_tied_weight_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    def tied(step: int) -> dict[str, Tensor]:
        torch.manual_seed(step)
        config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=40, n_positions=8)
        model = GPT2LMHeadModel(config)
        folder = tmp_path / "s" / f"step{step}"
        folder.mkdir(parents=True)
        config.save_pretrained(folder)
        state = model.state_dict()
        torch.save(state, folder / "pytorch_model.bin")
        return state

    models = [tied(step) for step in (10, 20, 30)]
    assert models[0]["lm_head.weight"].data_ptr() == models[0]["transformer.wte.weight"].data_ptr()
    result = run(tmp_path / "s")
    with safe_open(result.spec.target / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  (a safetensors handle is not a mapping)
        assert file.metadata()["lm_head.weight"] == "transformer.wte.weight"
    loaded = AutoModelForCausalLM.from_pretrained(result.spec.target)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    exact = sum(model["transformer.wte.weight"].double() for model in models) / 3
    assert ulps(loaded.lm_head.weight.detach(), exact) == 0


@dataclasses.dataclass
class GPTConfig:
    """Configuration object in checkpoints of build-nanogpt."""

    block_size: int = 16
    vocab_size: int = 97
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 32


SETTINGS = {"block_size": 16, "vocab_size": 97, "n_layer": 2, "n_head": 2, "n_embd": 32}


@pytest.mark.parametrize("kind", ["nanogpt", "build-nanogpt", "paper"])
def test_nanogpt_files_become_gpt2_folders(tmp_path: Path, kind: str) -> None:
    (tmp_path / "s").mkdir()
    shape = ModelConfig(
        **{k: v for k, v in SETTINGS.items() if k != "block_size"},
        bias=kind == "build-nanogpt",
        scale_attn_by_inverse_layer_idx=False,
    )
    models = []
    for step in (10, 20, 30):
        model = GPT(shape, 16, seed=step)
        state = model.state_dict()
        models.append({name: tensor.clone() for name, tensor in state.items()})
        state["lm_head.weight"] = state["transformer.wte.weight"]
        prefix = {"nanogpt": "_orig_mod.", "paper": "module.", "build-nanogpt": ""}[kind]
        document: dict[str, object] = {
            "model": {prefix + n: t for n, t in state.items()},
            "iter_num": step,
        }
        if kind == "build-nanogpt":
            document["config"] = GPTConfig()
        else:
            document["model_args"] = SETTINGS | {"bias": False, "dropout": 0.0}
        torch.save(document, tmp_path / "s" / f"ckpt_{step}.pt")
    torch.save({"model": models[0]}, tmp_path / "s" / "ckpt_best.pt")
    result = run(tmp_path / "s")
    mine = load_model(result.spec.target).state_dict()
    exact = average_of(models, [1 / 3] * 3)
    for name, tensor in mine.items():
        assert ulps(tensor, exact[name]) <= 1, name
    tokens = torch.arange(16).view(1, 16)
    theirs = AutoModelForCausalLM.from_pretrained(result.spec.target).eval()
    with torch.no_grad():
        logits = load_model(result.spec.target).logits(tokens)
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)


class Payload:
    """Object that runs a command when unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch pwned",))


class OddConfig:
    """Object built with arguments, which the inert replacement does not accept."""

    def __reduce__(self) -> tuple[object, ...]:
        return (GPTConfig, (16, 97))


@pytest.mark.parametrize("config", [Payload(), OddConfig()])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, config: object) -> None:
    (tmp_path / "s").mkdir()
    for step in (10, 20, 30):
        torch.save(
            {"model": {"w": torch.ones(3)}, "config": config}, tmp_path / "s" / f"ckpt_{step}.pt"
        )
    with pytest.raises(UserError, match="as tensors"):
        run(tmp_path / "s")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04" + bytes(50)])
def test_damaged_torch_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s").mkdir()
    for step in (10, 20, 30):
        torch.save({"model": {"w": torch.ones(3)}}, tmp_path / "s" / f"ckpt_{step}.pt")
    (tmp_path / "s" / "ckpt_20.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"ckpt_20\.pt"):
        run(tmp_path / "s")
