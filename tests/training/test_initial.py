"""Continued pre-training: initial weights and replayed data."""

from pathlib import Path
from typing import Any

import pytest
import torch
from preparations import prepare
from safetensors.torch import load_file, save_file
from tiny_training import Build, quiet
from transformers import GPT2Config, GPT2LMHeadModel
from worlds import train_together

from llmtrain.checkpoints.gpt2_folder import load_model
from llmtrain.config.schema import RunConfig
from llmtrain.errors import UserError
from llmtrain.model.gpt import GPT
from llmtrain.storage.json_files import read_events
from llmtrain.storage.run_folder import RunFolder
from llmtrain.training.initial import load_initial_weights, open_weights


def biased(tiny: Build, **overrides: Any) -> RunConfig:
    model = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 264, "bias": True}
    model["scale_attn_by_inverse_layer_idx"] = False
    config: RunConfig = tiny(model=model | overrides.pop("model", {}), **overrides)
    return config


def begun(source: Path, config: RunConfig) -> GPT:
    model = GPT(config.model, config.data.block_size, config.seed)
    load_initial_weights(open_weights(str(source)), model, config)
    return model


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """A GPT-2 saved by transformers, with a smaller vocabulary and a longer context."""
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=260, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "public")
    return tmp_path / "public"


def test_a_public_model_gives_its_own_logits(tiny: Build, public: Path) -> None:
    config = biased(tiny)
    tokens = torch.randint(0, 260, (2, 16), generator=torch.Generator().manual_seed(3))
    expected = GPT2LMHeadModel.from_pretrained(public).eval()(tokens).logits
    model = begun(public, config).eval()
    torch.testing.assert_close(model.logits(tokens)[..., :260], expected, rtol=1e-5, atol=1e-5)
    fresh = GPT(config.model, 16, config.seed).transformer.wte.weight[260:]
    assert torch.equal(model.transformer.wte.weight[260:], fresh)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("value", [1e300, float("nan")])
def test_weights_that_float32_cannot_hold_are_rejected(
    tiny: Build, public: Path, value: float
) -> None:
    path = public / "model.safetensors"
    tensors = {name: tensor.double() for name, tensor in load_file(path).items()}
    tensors["transformer.wte.weight"][0, 0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"wte.weight contains NaN, infinity or values beyond"):
        begun(public, biased(tiny))


def test_a_nanogpt_file_is_read(tiny: Build, tmp_path: Path) -> None:
    config = biased(tiny, model={"activation": "gelu"})
    trained = GPT(config.model, 16, seed=9)
    state = {f"_orig_mod.{name}": tensor for name, tensor in trained.state_dict().items()}
    state["_orig_mod.lm_head.weight"] = trained.transformer.wte.weight
    arguments = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "block_size": 16,
        "bias": True,
        "vocab_size": 264,
    }
    torch.save({"model": state, "model_args": arguments, "iter_num": 5}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="does not fit the model") as caught:
        begun(tmp_path / "ckpt.pt", biased(tiny))
    assert caught.value.hint == "--set model.activation=gelu"
    model = begun(tmp_path / "ckpt.pt", config)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"n_layer": 3}}, "model.n_layer=2"),
        ({"model": {"vocab_size": 256}}, "model.vocab_size=260"),
        (
            {"model": {"scale_attn_by_inverse_layer_idx": True}},
            "scale_attn_by_inverse_layer_idx=false",
        ),
        ({"data__block_size": 64}, "data.block_size=32"),
        ({"model": {"bias": False}}, "model.bias=true"),
    ],
)
def test_another_model_is_refused(
    tiny: Build, public: Path, changes: dict[str, Any], message: str
) -> None:
    weights = GPT2LMHeadModel.from_pretrained(public)
    with torch.no_grad():
        weights.transformer.ln_f.bias.fill_(1.0)
    weights.save_pretrained(public)
    with pytest.raises(UserError) as caught:
        begun(public, biased(tiny, **changes))
    assert message in caught.value.hint


def test_tensors_that_a_gpt2_does_not_use_are_refused(tiny: Build, public: Path) -> None:
    path = public / "model.safetensors"
    extra = {"transformer.h.0.attn.q_norm.weight": torch.ones(16)}
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"not a GPT-2: it contains .*q_norm"):
        begun(public, biased(tiny))
    with pytest.raises(UserError, match=r"not a GPT-2: it contains .*q_norm"):
        load_model(public)


def test_a_file_without_a_config_is_refused(tiny: Build, tmp_path: Path) -> None:
    torch.save({"model": {"transformer.h.0.q_norm.weight": torch.ones(16)}}, tmp_path / "fork.pt")
    with pytest.raises(UserError, match=r"fork\.pt is not a GPT-2: it has no config"):
        begun(tmp_path / "fork.pt", biased(tiny))


def test_sources_without_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="is a run") as caught:
        open_weights(str(tmp_path))
    assert "averages/" in caught.value.hint
    with pytest.raises(UserError, match="nowhere does not exist"):
        open_weights("nowhere")


@pytest.mark.slow
def test_a_run_starts_from_an_average_and_replays_earlier_data(
    tiny: Build, tmp_path: Path, text_file: Path
) -> None:
    """One process and two with shards start at the same loss, far below that of random weights."""
    before = quiet(tiny(train__max_steps=40), tmp_path / "before")
    average = before.average("ema-0.9", 40)
    prepare(str(text_file), tmp_path / "old", tokenizer="byte", val_fraction=0.2)
    data = {"path": tiny().data.path, "block_size": 16}
    data["mix"] = [{"path": str(tmp_path / "old"), "weight": 0.25}]
    options = {
        "data": data,
        "init_from": str(average),
        "log": {"every": 1},
        "train__micro_batch": 2,
    }
    one = quiet(tiny(**options), tmp_path / "one")
    train_together(2, tiny(**options, train__parallel="fsdp"), tmp_path / "two")
    losses = [
        [event["loss"] for event in read_events(run.metrics) if "lr" in event]
        for run in (one, RunFolder(tmp_path / "two"))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    scratch = quiet(tiny(log={"every": 1}), tmp_path / "scratch")
    assert losses[0][0] < next(e["loss"] for e in read_events(scratch.metrics) if "lr" in e) - 1
    assert load_model(one.snapshot(12)).n_parameters() == load_model(average).n_parameters()
