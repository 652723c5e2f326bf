"""Exported repositories in transformers, tokenizers, nanoGPT and a simulated hub."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer
from safetensors.torch import load_file

from llmtrain.averaging.average import average
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.request import AverageRequest
from llmtrain.checkpoints.checkpoint import Origin, load_origin
from llmtrain.checkpoints.gpt2_folder import Shape, load_model, save_weights
from llmtrain.checkpoints.open import open_checkpoint
from llmtrain.checkpoints.resolve import Target, find_targets
from llmtrain.checkpoints.series import run_series
from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.errors import UserError
from llmtrain.evaluation.generation import generate_text, load_generator
from llmtrain.evaluation.loss import measure_losses
from llmtrain.evaluation.options import EvalOptions, Sampling
from llmtrain.evaluation.selection import choose_weights
from llmtrain.export.model_card import model_card
from llmtrain.export.publish import export
from llmtrain.model.gpt import GPT
from llmtrain.model.tokenizer import load_tokenizer
from llmtrain.storage.run_folder import RunFolder
from llmtrain.training.run import pretrain

PIPELINE = """
import sys
from transformers import pipeline
write = pipeline("text-generation", sys.argv[1])
assert not any(name.startswith("llmtrain") for name in sys.modules)
write("The", do_sample=True)
sys.stdout.buffer.write(write("The", do_sample=False)[0]["generated_text"].encode())
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., RunConfig]) -> RunFolder:
    """Return a run with a post-hoc average, both evaluated."""
    folder = tmp_path_factory.mktemp("exports") / "runs" / "tiny"
    trained = pretrain(tiny(averages=[]), folder, log=lambda line: None).run
    series = run_series(trained)
    average(series, make_specs(series, AverageRequest(method="lawa", every=2, window=3)))
    measure_losses(
        find_targets(folder, every_snapshot=False), EvalOptions(), lambda *progress: None
    )
    return trained


def make_weights(folder: Path, *, bias: bool = False, vocab_size: int = 264) -> Target:
    """Write random weights without a run, with attention scaled by layer."""
    shape = Shape(
        ModelConfig(n_layer=3, n_head=2, n_embd=16, vocab_size=vocab_size, bias=bias), 24, 256
    )
    model = GPT(shape.model, 24, seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3
            )
    folder.mkdir()
    save_weights(folder, dict(model.state_dict()), shape, Origin(7, 70, 0.1, "made"))
    return Target("made", 7, folder, None)


@pytest.mark.slow
def test_transformers_pipeline_loads_the_folder(run: RunFolder) -> None:
    folder = run.path / "exported"
    weights = choose_weights(str(run.path)).weights
    export(weights, folder, name="exported")
    done = subprocess.run(
        [sys.executable, "-c", PIPELINE, folder], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    model, tokenizer = load_generator(folder)
    room = Sampling(max_tokens=model.block_size - 3, temperature=0)
    ids = load_tokenizer("byte").encode(
        "The" + "".join(generate_text(model, tokenizer, "The", room))
    )
    assert load_tokenizer("byte").encode(done.stdout.decode())[: len(ids)].tolist() == ids.tolist()


def test_model_card_has_data_losses_and_averaging(run: RunFolder) -> None:
    weights = choose_weights(str(run.average("lawa-3x2", 12))).weights
    export(weights, run.path / "carded", name="owner/name", dtype="bf16")
    card = (run.path / "carded" / "README.md").read_text()
    assert "- weight-averaging" in card
    assert 'pipeline("text-generation", "owner/name")' in card
    assert "`lawa-3x2` of the run `tiny` at step 12 (1,536 tokens), in bfloat16" in card
    assert [line.split("|")[1].strip() for line in card.splitlines() if " of val |" in line] == [
        "raw",
        "lawa-3x2",
    ]
    inputs = [
        line.split("|")[1:3]
        for line in card.splitlines()
        if line.startswith(("| 8 |", "| 10 |", "| 12 |"))
    ]
    assert [(int(step), float(weight)) for step, weight in inputs] == [
        (s, pytest.approx(1 / 3)) for s in (8, 10, 12)
    ]
    assert str(run.path.parents[1]) not in card
    assert load_origin(run.path / "carded") == load_origin(weights.path)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_rounded_to_nearest(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    target = make_weights(tmp_path / "made", bias=True)
    export(target, tmp_path / "out", name="out", dtype=name)
    before = load_file(target.path / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value.to(dtype)) for key, value in before.items())


@pytest.mark.slow
def test_padded_ids_are_never_generated(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    target = make_weights(tmp_path / "made")
    export(target, tmp_path / "out", name="out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.suppress_tokens == list(range(257, 264))
    assert model.generation_config.max_length == 24
    with torch.no_grad():
        model.transformer.wte.weight[260] *= 100
    assert 260 not in model.generate(torch.tensor([[1, 2]]), do_sample=False)[0]


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_checkpoint(tmp_path: Path, bias: bool) -> None:
    target = make_weights(tmp_path / "made", bias=bias)
    warnings: list[str] = []
    export(target, tmp_path / "out", name="out", form="nanogpt", warn=warnings.append)
    assert warnings == [
        "nanoGPT uses the exact GELU and this model the tanh form: logits differ by about 0.001"
    ]
    saved = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert saved.keys() == {
        "model",
        "optimizer",
        "model_args",
        "iter_num",
        "best_val_loss",
        "config",
        "activation_function",
    }
    sizes = {"n_layer": 3, "n_head": 2, "n_embd": 16, "vocab_size": 264, "block_size": 24}
    assert saved["model_args"] == sizes | {"bias": bias, "dropout": 0.0}
    assert saved["iter_num"] == 7
    # nanoGPT's model is ours without the attention scaling, plus a name for the tied output layer.
    config = ModelConfig(
        **{key: sizes[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")},
        bias=bias,
        scale_attn_by_inverse_layer_idx=False,
    )
    nanogpt = GPT(config, 24)
    head = saved["model"].pop("lm_head.weight")
    assert torch.equal(head, saved["model"]["transformer.wte.weight"])
    nanogpt.load_state_dict(saved["model"])
    tokens = torch.randint(0, 264, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = load_model(target.path).logits(tokens)
    torch.testing.assert_close(nanogpt.eval().logits(tokens), expected, atol=1e-4, rtol=0)
    matrices = [p for p in nanogpt.parameters() if p.dim() >= 2]
    others = [p for p in nanogpt.parameters() if p.dim() < 2]
    torch.optim.AdamW([{"params": matrices}, {"params": others}]).load_state_dict(
        saved["optimizer"]
    )
    config_here = open_checkpoint(tmp_path / "out" / "ckpt.pt", step=7).config
    assert config_here is not None and config_here["activation_function"] == "gelu_new"


def test_invalid_exports_are_rejected(tmp_path: Path) -> None:
    target = make_weights(tmp_path / "made")
    with pytest.raises(UserError, match="already exists"):
        export(target, tmp_path, name="out")
    with pytest.raises(UserError, match="the gpt2 tokenizer has 50,257 ids"):
        export(target, tmp_path / "out", name="out", tokenizer="gpt2")
    model = load_model(target.path)
    shape = Shape(model.config, 24, 256)
    for value, problem in ((70_000.0, "contains 70000"), (float("nan"), "contains nan")):
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        weights["transformer.ln_f.weight"][3] = value
        save_weights(target.path, weights, shape, Origin(7, 70, 0.1, "made"))
        with pytest.raises(UserError, match=problem):
            export(target, tmp_path / "out", name="out", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_model_card_without_a_run(tmp_path: Path) -> None:
    target = make_weights(tmp_path / "made")
    card = model_card(
        target,
        Shape(load_model(target.path).config, 24, 256),
        load_tokenizer("byte"),
        dtype="float32",
        name=str(tmp_path / "x"),
    )
    assert "## Model" in card
    assert str(tmp_path) not in card
    assert not {"## Data", "## Losses", "## Averaging", "## Recipe"} & set(card.splitlines())


@pytest.mark.slow
def test_push_uploads_the_folder(run: RunFolder, tmp_path: Path) -> None:
    def push(hub: HubServer, token: str, to: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "llmtrain",
            "export",
            run.path,
            "--to",
            tmp_path / to,
            "--push",
            "me/tiny",
        ]
        environment = (
            os.environ
            | hub.environment(tmp_path / "home")
            | {"HF_HUB_OFFLINE": "0", "HF_TOKEN": token}
        )
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    with HubServer() as hub:
        done = push(hub, TOKEN, "out")
        assert done.returncode == 0, done.stderr
        assert f"{hub.url}/me/tiny" in done.stdout
        assert hub.created["me/tiny"]["visibility"] == "private"
        assert hub.pushed["me/tiny"] == {
            path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()
        }
        refused = push(hub, "hf_of_someone_else", "again")
    assert refused.returncode == 2
    assert "no permission for me/tiny on the hub" in refused.stderr
    assert "again is complete" in refused.stderr
