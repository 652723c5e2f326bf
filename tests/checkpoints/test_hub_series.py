"""Average a GPT-NeoX series that a local HTTP server offers to the real hub client; plant faults.

Each command runs in a subprocess, because the client reads its endpoint on import.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from oracles import average_of, ulps
from safetensors.torch import load_file, save_file
from tiny_runs import load_all
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

pytestmark = pytest.mark.slow

REPOSITORY = "tiny/neox"
LAST = 20_000
BUFFER = "gpt_neox.layers.0.attention.bias"
"""Causal mask; old GPT-NeoX checkpoints store it as integers."""


def write_series(root: Path, *, tied: bool, vocab_size: int = 128) -> dict[str, Path]:
    """Write revisions step1000 to step20000 and main: a random walk from one initial model."""
    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(config)
    revisions = {}
    for step in range(1000, LAST + 1, 1000):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=1e-3)
        folder = root / f"step{step}"
        model.save_pretrained(folder, max_shard_size="30KB")
        shard = min(folder.glob("model-*.safetensors"))
        mask = torch.ones(1, 1, 16, 16, dtype=torch.uint8).tril()
        save_file(load_file(shard) | {BUFFER: mask}, shard, metadata={"format": "pt"})
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"][BUFFER] = shard.name
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        revisions[folder.name] = folder
    shutil.copytree(root / f"step{LAST}", root / "main")
    return revisions | {"main": root / "main"}


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("neox")
    write_series(root / "untied", tied=False)
    write_series(root / "tied", tied=True)
    return root


@pytest.fixture
def hub(series: Path, tmp_path: Path) -> Iterator[HubServer]:
    """Serve a copy of the untied series that a test may damage."""
    shutil.copytree(series / "untied", tmp_path / "hub")
    with HubServer() as server:
        server.add(
            "model", REPOSITORY, {path.name: path for path in sorted((tmp_path / "hub").iterdir())}
        )
        yield server


def average(hub: HubServer, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmtrain", "average", *arguments]
    environment = os.environ | hub.environment(cwd / "hf-home") | {"HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def averaged(hub: HubServer, cwd: Path, *arguments: str) -> dict[str, Any]:
    done = average(hub, cwd, REPOSITORY, "--every", "1000", "--at", "15000", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(done.stdout)
    result: dict[str, Any] = entry
    return result


def oracle(root: Path) -> dict[str, Tensor]:
    models = [load_all(root / f"step{step}") for step in range(11_000, 15_001, 1000)]
    return average_of(models, [0.2] * 5)


def assert_equal_to(folder: Path, exact: dict[str, Tensor]) -> None:
    got = load_all(folder)
    assert got.keys() == exact.keys()
    for name, tensor in got.items():
        assert (
            ulps(tensor, exact[name]) <= 1
            if tensor.is_floating_point()
            else torch.equal(tensor, exact[name])
        )


def downloads(hub: HubServer) -> list[str]:
    return [
        request for request in hub.requests if request.startswith("GET") and "/resolve/" in request
    ]


def test_average_downloads_only_the_window(hub: HubServer, tmp_path: Path) -> None:
    entry = averaged(hub, tmp_path)
    folder = tmp_path / entry["path"]
    assert entry["path"] == "averages/neox/lawa-5x1000/step-00015000"
    assert entry["inputs"] == [11_000, 12_000, 13_000, 14_000, 15_000]
    assert_equal_to(folder, oracle(tmp_path / "hub"))
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    provenance = json.loads((folder / "provenance.json").read_text())
    for source in provenance["inputs"]:
        commit = hub.commit("model", REPOSITORY, f"step{source['step']}")
        assert source["path"] == f"{REPOSITORY}@{commit}"
        assert source["sha256_source"] == "computed"
    needed = {hub.commit("model", REPOSITORY, f"step{step}") for step in entry["inputs"]}
    assert {request.split("/resolve/")[1].split("/")[0] for request in downloads(hub)} == needed


def test_transformers_loads_the_average(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / averaged(hub, tmp_path)["path"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    exact = oracle(tmp_path / "hub")
    for loaded, tensor in model.state_dict().items():
        name = loaded if loaded in exact else "embed_out.weight"  # its name in GPT-NeoX files
        assert ulps(tensor, exact[name]) <= 1, name


def test_tied_weights_stay_tied(series: Path, tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.add("model", REPOSITORY, {path.name: path for path in (series / "tied").iterdir()})
        folder = tmp_path / averaged(hub, tmp_path)["path"]
    assert_equal_to(folder, oracle(series / "tied"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_discard_inputs_gives_the_same_average_and_leaves_no_files(
    hub: HubServer, tmp_path: Path
) -> None:
    folder = tmp_path / averaged(hub, tmp_path, "--discard-inputs", "--label", "folded")["path"]
    assert not list(tmp_path.rglob("*.incomplete"))
    assert {p.name for p in (tmp_path / "averages" / "neox").iterdir()} == {"folded"}
    assert not list((tmp_path / "hf-home").rglob("*.safetensors"))
    whole = tmp_path / averaged(hub, tmp_path, "--label", "whole")["path"]
    for path in whole.glob("model*"):
        assert path.read_bytes() == (folder / path.name).read_bytes()
    mine, theirs = (json.loads((f / "provenance.json").read_text()) for f in (folder, whole))
    assert [i["sha256"] for i in mine["inputs"]] == [i["sha256"] for i in theirs["inputs"]]
    before = len(downloads(hub))
    assert averaged(hub, tmp_path, "--discard-inputs", "--label", "folded")["path"]
    assert len(downloads(hub)) == before


def test_duplicate_revision_is_rejected_before_download(hub: HubServer, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "hub" / "step12000")
    shutil.copytree(tmp_path / "hub" / "step14000", tmp_path / "hub" / "step12000")
    done = average(hub, tmp_path, REPOSITORY, "--every", "1000", "--at", "15000")
    assert done.returncode == 2
    assert "is the same at steps 12,000, 14,000" in done.stderr
    assert downloads(hub) == []


def test_shard_of_the_final_model_is_rejected(hub: HubServer, tmp_path: Path) -> None:
    shard = min((tmp_path / "hub" / "main").glob("model-*.safetensors")).name
    shutil.copyfile(tmp_path / "hub" / "main" / shard, tmp_path / "hub" / "step13000" / shard)
    done = average(hub, tmp_path, REPOSITORY, "--every", "1000", "--at", "15000")
    assert done.returncode == 2
    assert f"{shard} at 13,000 is {shard} of the finished model" in done.stderr
    assert downloads(hub) == []


def test_nan_is_rejected(hub: HubServer, tmp_path: Path) -> None:
    shard = max((tmp_path / "hub" / "step13000").glob("model-*.safetensors"))
    tensors = load_file(shard)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    done = average(hub, tmp_path, REPOSITORY, "--every", "1000", "--at", "15000")
    assert done.returncode == 2
    assert f"{name} contains nan" in done.stderr
    assert "step 13,000" in done.stderr
    assert not list((tmp_path / "averages").rglob("*.safetensors"))


def test_missing_step_error_lists_the_steps(hub: HubServer, tmp_path: Path) -> None:
    del hub.repositories["model", REPOSITORY]["step13000"]
    done = average(hub, tmp_path, REPOSITORY, "--every", "1000", "--at", "15000")
    assert done.returncode == 2
    assert "1,000 to 12,000 every 1,000, 14,000 to 20,000 every 1,000" in done.stderr


def test_index_with_outside_path_is_rejected(hub: HubServer, tmp_path: Path) -> None:
    index = tmp_path / "hub" / "step13000" / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"][BUFFER] = "../../../../secret.safetensors"
    index.write_text(json.dumps(document))
    done = average(hub, tmp_path, REPOSITORY, "--every", "1000", "--at", "15000")
    assert done.returncode == 2
    assert "not the name of a" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["tiny/nothing", "--every", "1000"], 2, "the hub has no tiny/nothing"),
        (
            [REPOSITORY, "--every", "1000", "--revision-pattern", "epoch{N}"],
            2,
            "no revision named epoch{N}",
        ),
        ([REPOSITORY, "--every", "1000", "--revision-pattern", "step"], 2, "lacks {N}"),
        ([REPOSITORY, "--every", "1500"], 2, "--every 1000"),
    ],
)
def test_unknown_repository_or_revision_is_an_error(
    hub: HubServer, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    done = average(hub, tmp_path, *arguments)
    assert done.returncode == code
    assert said in done.stderr
    assert "hint:" in done.stderr


def test_revision_pattern_with_wildcard(hub: HubServer, tmp_path: Path) -> None:
    revisions = hub.repositories["model", REPOSITORY]
    hub.add(
        "model",
        "tiny/olmo",
        {f"stage1-{name}-tokens{len(name)}B": path for name, path in revisions.items()},
    )
    done = average(
        hub,
        tmp_path,
        "tiny/olmo",
        "--every",
        "1000",
        "--window",
        "2",
        "--revision-pattern",
        "stage1-step{N}-tokens*",
        "--show-weights",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["inputs"] == [19_000, 20_000]


@pytest.mark.parametrize(
    "variables", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_without_network_exit_code_is_1_with_a_hint(
    variables: dict[str, str], hub: HubServer, tmp_path: Path
) -> None:
    environment = (
        os.environ | hub.environment(tmp_path / "hf-home") | {"HF_HUB_OFFLINE": "0"} | variables
    )
    command = [sys.executable, "-m", "llmtrain", "average", REPOSITORY, "--every", "1000"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "cannot reach the hub" in done.stderr
    assert "HF_HUB_OFFLINE" in done.stderr
