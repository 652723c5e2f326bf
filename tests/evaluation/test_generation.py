"""Text generation compared with transformers: greedy choice, sampling filters, streamed text."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import constants, get_session
from hypothesis import given
from hypothesis import strategies as st
from in_process import invoke
from transformers import (
    AutoModelForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmtrain.averaging.average import average
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.request import AverageRequest
from llmtrain.checkpoints.checkpoint import Origin
from llmtrain.checkpoints.gpt2_folder import Shape, save_weights
from llmtrain.checkpoints.series import run_series
from llmtrain.cli.generate import visible
from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.errors import RunFailed, UserError
from llmtrain.evaluation.generation import (
    KVCache,
    filter_logits,
    generate,
    generate_text,
    load_generator,
    next_logits,
    stream_text,
)
from llmtrain.evaluation.options import Sampling
from llmtrain.model.gpt import GPT
from llmtrain.model.tokenizer import load_tokenizer, tokenizer_files
from llmtrain.storage.hub import hub_errors
from llmtrain.storage.run_folder import RunFolder
from llmtrain.training.run import pretrain

PROMPT = [5, 17, 3, 42]


def write_folder(
    folder: Path, *, bias: bool, scaled: bool, vocab_size: int = 100, eot: int = 99
) -> GPT:
    """Write a model with large random weights, so that its tokens vary."""
    config = ModelConfig(
        n_layer=3,
        n_head=4,
        n_embd=32,
        vocab_size=vocab_size,
        bias=bias,
        scale_attn_by_inverse_layer_idx=scaled,
    )
    model = GPT(config, block_size=24, seed=3).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 2 else 0.02
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    folder.mkdir(exist_ok=True)
    save_weights(folder, model.state_dict(), Shape(config, 24, eot), Origin(1, 1, 0.1, "test"))
    return model


@pytest.mark.parametrize(("bias", "scaled"), [(False, True), (True, False)])
def test_greedy_generation_equals_transformers(tmp_path: Path, bias: bool, scaled: bool) -> None:
    model = write_folder(tmp_path, bias=bias, scaled=scaled)
    ours = list(generate(model, PROMPT, Sampling(max_tokens=20, temperature=0), eot=99))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = reference.generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False)[
        0, len(PROMPT) :
    ]
    ended = theirs[theirs != 99].tolist()
    assert ours == ended
    assert len(set(ours)) > 3


def test_beyond_the_block_size_the_recent_half_of_the_context_is_kept(tmp_path: Path) -> None:
    model = write_folder(tmp_path, bias=False, scaled=True)
    sampling = Sampling(max_tokens=60, temperature=0)
    context, expected = PROMPT, []
    for _ in range(sampling.max_tokens):  # without a cache, from the whole context
        if len(context) > model.block_size:
            context = context[-model.block_size // 2 :]
        with torch.no_grad():
            token = int(model.logits(torch.tensor([context]))[0, -1, :99].argmax())
        expected.append(token)
        context = [*context, token]
    assert list(generate(model, PROMPT, sampling, eot=99, vocabulary=99)) == expected


@torch.no_grad()
def test_incremental_logits_equal_those_of_the_whole_context(tmp_path: Path) -> None:
    model = write_folder(tmp_path, bias=True, scaled=True)
    tokens = torch.randint(0, 100, (1, 24), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model)
    read = [next_logits(model, tokens[:, :7], cache)]
    read += [next_logits(model, tokens[:, t : t + 1], cache) for t in range(7, 24)]
    torch.testing.assert_close(torch.stack(read), model.logits(tokens)[0, 6:], atol=1e-4, rtol=0)


@given(
    st.integers(0, 1000),
    st.integers(1, 12) | st.none(),
    st.floats(0.01, 0.999) | st.just(1.0) | st.none(),
    st.floats(0.1, 3.0),
)
def test_sampling_filters_equal_those_of_transformers(
    seed: int, top_k: int | None, top_p: float | None, temperature: float
) -> None:
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(seed)) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None and top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    ours = filter_logits(logits[0] / temperature, Sampling(top_k=top_k, top_p=top_p))
    assert torch.equal(ours.isinf(), expected[0].isinf())
    assert torch.equal(ours[ours.isfinite()], expected[0][expected[0].isfinite()])


@given(st.text(), st.sampled_from(["byte", "gpt2"]), st.integers(0, 40))
def test_streamed_text_contains_whole_characters_only(text: str, name: str, cut: int) -> None:
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode(text).tolist()
    assert "".join(stream_text(ids, tokenizer)) == tokenizer.decode(ids)
    assert text.startswith("".join(stream_text(ids[:cut], tokenizer)))


def test_invalid_bytes_become_replacement_characters() -> None:
    assert "".join(stream_text([65, 0xFF, 66, 0xC3], load_tokenizer("byte"))) == "A�B"


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": 1e-40},
        {"top_k": 0},
        {"seed": 2**63},
        {"top_p": 1.5},
    ],
)
def test_sampling_options_out_of_range_raise(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="--" + next(iter(wrong)).replace("_", "-")):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_nan_weights_raise_instead_of_generating(tmp_path: Path) -> None:
    model = write_folder(tmp_path, bias=False, scaled=True)
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = float("nan")
    with pytest.raises(RunFailed, match="not finite"):
        next(generate(model, PROMPT, Sampling(), eot=99))


def test_the_end_of_text_id_selects_the_tokenizer(tmp_path: Path) -> None:
    write_folder(tmp_path / "bytes", bias=False, scaled=True, vocab_size=264, eot=256)
    assert load_generator(tmp_path / "bytes")[1].name == "byte"
    with pytest.raises(UserError, match="264 embedding rows, but the gpt2 tokenizer"):
        load_generator(tmp_path / "bytes", tokenizer="gpt2")
    write_folder(tmp_path / "other", bias=False, scaled=True)
    with pytest.raises(UserError, match="uses the end-of-text token 99"):
        load_generator(tmp_path / "other")
    files = tokenizer_files(load_tokenizer("byte"), 24)
    (tmp_path / "bytes" / "vocab.json").write_text(files["vocab.json"])
    assert load_generator(tmp_path / "bytes")[1].name == "byte"
    (tmp_path / "bytes" / "tokenizer.json").write_text(
        files["tokenizer.json"].replace(": 65,", ": 66,")
    )
    with pytest.raises(UserError, match="produce other ids than our byte"):
        load_generator(tmp_path / "bytes")
    assert load_generator(tmp_path / "bytes", tokenizer="byte")[1].name == "byte"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., RunConfig]) -> RunFolder:
    """Return a run of twelve steps with an online and a post-hoc average."""
    folder = tmp_path_factory.mktemp("written") / "runs" / "tiny"
    trained = pretrain(tiny(), folder, log=lambda line: None).run
    series = run_series(trained)
    average(series, make_specs(series, AverageRequest(method="lawa", every=2, window=3)))
    return trained


def test_the_command_streams_compares_and_prints_json(run: RunFolder) -> None:
    place = run.path.parents[1]
    options = ("--prompt", "é [b]", "--max-tokens", "30", "--num", "2")
    streamed = invoke("generate", *options, cwd=place)
    assert streamed.code == 0, streamed.stderr
    documents = json.loads(invoke("generate", *options, "--json", "--compare", cwd=place).stdout)
    assert [(d["label"], d["seed"]) for d in documents][::2] == [("raw", 1337), ("raw", 1338)]
    texts = ["é [b]" + visible(document["text"]) for document in documents]
    assert streamed.stdout == "\n---\n".join(texts[::2]) + "\n"  # raw is better so early
    assert len(set(texts)) > 2
    table = invoke("generate", *options, "--compare", cwd=place).stdout
    assert "raw" in table
    assert "é [b]" in table


@pytest.mark.parametrize("option", ["--json", "--compare"])
def test_a_signal_discards_text_that_is_printed_at_the_end(
    run: RunFolder, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> Iterator[str]:
        os.kill(os.getpid(), signal.SIGINT)
        return generate_text(*arguments)

    monkeypatch.setattr("llmtrain.evaluation.generation.generate_text", interrupted)
    ended = invoke("generate", run.path, option, cwd=run.path)
    assert (ended.code, ended.stdout) == (130, "")
    assert "the text ends here" in ended.stderr


@pytest.mark.slow
def test_weights_from_the_hub(tmp_path: Path) -> None:
    write_folder(tmp_path / "tiny", bias=True, scaled=False, vocab_size=264, eot=256)

    def run(name: str) -> CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "llmtrain",
            "generate",
            name,
            "--max-tokens",
            "3",
            "--json",
        ]
        environment = os.environ | hub.environment(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    with HubServer() as hub:
        hub.add("model", "owner/tiny", {"main": tmp_path / "tiny"})
        (document,) = json.loads(run("owner/tiny@main").stdout)
        absent = run("owner/tiny@step9")
    assert document["label"] == "tiny@main"
    assert absent.returncode == 2
    assert "the hub has no owner/tiny at step9" in absent.stderr


def test_an_unreachable_hub_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with (
        pytest.raises(RunFailed, match="cannot reach the hub for a look"),
        hub_errors("a look"),
    ):
        get_session().head("http://127.0.0.1:9", timeout=5)
