"""Input made to harm: each is refused by the command in one line with a hint, and nothing of it is run or believed."""

import json
import math
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import invoke
from safetensors.torch import save_file
from tiny_runs import SHAPE, weights_at

from llmtrain.checkpoints.checkpoint import Origin
from llmtrain.checkpoints.gpt2_folder import save_weights
from llmtrain.config.loading import dump_config
from llmtrain.config.schema import RunConfig
from llmtrain.data.manifest import Manifest
from llmtrain.training.run import pretrain


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, data_folder: Path, tiny: Callable[..., RunConfig]
) -> Path:
    """Data, a run and its config."""
    place = tmp_path_factory.mktemp("trained")
    shutil.copytree(data_folder, place / "data")
    config = tiny(data__path="data", train__max_steps=8)
    (place / "config.yaml").write_text(dump_config(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        pretrain(config, Path("run"), log=lambda line: None)
    assert invoke("eval", "run", cwd=place).code == 0
    return place


@pytest.fixture
def workplace(trained: Path, tmp_path: Path) -> Path:
    """A copy of what `trained` made, to be damaged."""
    return shutil.copytree(trained, tmp_path / "place")


def refused(*arguments: str | Path, cwd: Path, said: str, code: int = 2) -> None:
    """The command ends with `code`, one line that holds `said`, and a hint."""
    outcome = invoke(*arguments, cwd=cwd)
    assert outcome.code == code, outcome
    assert outcome.stderr.startswith("error: "), outcome
    message, hint, *more = outcome.stderr.splitlines()
    assert said in message, message
    assert len(message) < 600
    assert hint.startswith("hint: ") and len(hint) > 10
    assert not more


# --- files of torch ---------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch pwned",))


def repacked(
    path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> None:
    """Rewrite every entry of a file of torch."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def pickle_bomb(path: Path) -> None:
    torch.save({"model": {"w": torch.ones(3)}, "config": Bomb()}, path)


def plain_pickle_bomb(path: Path) -> None:
    path.write_bytes(pickle.dumps({"model": Bomb()}))


def zip_bomb(path: Path) -> None:
    torch.save({"w": torch.ones(3)}, path)
    repacked(
        path,
        lambda name, old: bytes(200_000_000) if name.endswith("data/0") else old,
        zipfile.ZIP_DEFLATED,
    )


def absurd_storage(path: Path) -> None:
    torch.save({"w": torch.ones(70_000)}, path)
    small, large = (b"J" + struct.pack("<i", number) for number in (70_000, 2**31 - 1))
    repacked(
        path, lambda name, old: old.replace(small, large) if name.endswith("data.pkl") else old
    )


def absurd_view(path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(2**20, 2**20)}, path)


@pytest.mark.parametrize("name", ["ckpt_{}.pt", "step{}/pytorch_model.bin"])
@pytest.mark.parametrize(
    ("write", "said"),
    [
        (pickle_bomb, "as tensors"),
        (plain_pickle_bomb, "as tensors"),
        (zip_bomb, "unpacks to more bytes than it has"),
        (absurd_storage, "as tensors"),
        (absurd_view, "claims 4,398,046,511,104 bytes"),
    ],
)
def test_files_of_torch(
    tmp_path: Path, write: Callable[[Path], None], said: str, name: str
) -> None:
    for step in (10, 20):
        path = tmp_path / "s" / name.format(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    refused("average", "s", "--every", "10", "--window", "2", cwd=tmp_path, said=said)
    assert not (tmp_path / "pwned").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"s"}


# --- safetensors ------------------------------------------------------------------------------------


def entry(shape: list[Any], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def encoded(header: object, data: bytes = bytes(8)) -> bytes:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = json.dumps(entry([1], [0, 4]))
SAFETENSORS = {
    "length 2^63": struct.pack("<Q", 1 << 63) + b"{}",
    "length of 100 MB": struct.pack("<Q", 100_000_001) + bytes(100_000_001),
    "nested": encoded("[" * 1_000_000),
    "nested objects": encoded('{"a":' * 200_000),
    "overlap": encoded({"a": entry([1], [0, 4]), "b": entry([2], [0, 8])}),
    "hole": encoded({"a": entry([1], [4, 8])}),
    "outside": encoded({"a": entry([4], [0, 16])}),
    "backwards": encoded({"a": entry([2], [8, 0])}),
    "twice": encoded(f'{{"a": {ONE}, "a": {ONE}}}', bytes(4)),
    "negative": encoded({"a": entry([-1, -2], [0, 8])}),
    "negative offset": encoded({"a": entry([2], [-8, 0])}),
    "2^40 x 2^40": encoded({"a": entry([2**40, 2**40], [0, 8])}),
    "huge number": encoded(
        f'{{"a": {{"dtype": "F32", "shape": [1e999], "data_offsets": [0, {"9" * 5000}]}}}}'
    ),
    "nothing after zero": encoded({"a": entry([0, 2**40], [0, 0])}),
    "no such dtype": encoded({"a": entry([2], [0, 8], "F31")}),
    "unsupported dtype": encoded({"a": entry([8], [0, 8], "F8_E4M3")}),
    "no object": encoded([1]),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_headers_of_safetensors(tmp_path: Path, data_folder: Path, name: str) -> None:
    for step in (10, 20):
        (tmp_path / "s" / f"step{step}").mkdir(parents=True)
        (tmp_path / "s" / f"step{step}" / "model.safetensors").write_bytes(SAFETENSORS[name])
    said = "tensor 'a' has the unsupported dtype" if name == "unsupported dtype" else "is damaged"
    refused("average", "s", "--every", "10", "--window", "2", cwd=tmp_path, said=said)
    save_weights(tmp_path / "s" / "step10", weights_at(1), SHAPE, Origin(1, 1, 0.1, "x"))
    (tmp_path / "s" / "step10" / "model.safetensors").write_bytes(SAFETENSORS[name])
    outcome = invoke("eval", "s/step10", "--data", data_folder, cwd=tmp_path)
    assert outcome.code == 2 and outcome.stderr.startswith("error: "), outcome


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "..", "a/../../secret.safetensors", ["x"], None],
)
def test_an_index_that_leaves_its_folder(tmp_path: Path, data_folder: Path, name: object) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "secret.safetensors")
    for step in (10, 20):
        folder = tmp_path / "s" / f"step{step}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"w": name}})
        )
    said = "index.json places" if name != ".." else "not the name of"
    refused("average", "s", "--every", "10", "--window", "2", cwd=tmp_path, said=said)
    refused("inspect", "s", cwd=tmp_path, said=said)
    said = "not the name of a .safetensors file"
    refused("eval", "s/step10", "--data", data_folder, cwd=tmp_path, said=said)


def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "secret.safetensors")
    for step in (10, 20):
        (tmp_path / "s" / f"step{step}").mkdir(parents=True)
        (tmp_path / "s" / f"step{step}" / "model.safetensors").symlink_to(
            tmp_path / "secret.safetensors"
        )
    refused(
        "average",
        "s",
        "--every",
        "10",
        "--window",
        "2",
        cwd=tmp_path,
        said="a link to a file outside",
    )


# --- weights and configs of models --------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers(tmp_path: Path, data_folder: Path, value: float) -> None:
    for step in (10, 20):
        weights = weights_at(step)
        weights["transformer.wpe.weight"][3, 5] = value
        (tmp_path / "s" / f"step{step}").mkdir(parents=True)
        save_weights(tmp_path / "s" / f"step{step}", weights, SHAPE, Origin(step, step, 0.1, "x"))
    said = f"transformer.wpe.weight holds {value} at [3, 5]"
    refused("average", "s", "--every", "10", "--window", "2", cwd=tmp_path, said=said)


def test_a_loss_that_is_no_number(workplace: Path) -> None:
    path = workplace / "run/snapshots/step-00000008/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:] = np.float32("nan").tobytes()
    path.write_bytes(content)
    refused("eval", path.parent, cwd=workplace, said="the loss of", code=1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"model_type": "llama"},
            "the config asks for 6,477,352,960 parameters",
        ),  # a LLaMA of default size
        (
            {"model_type": "llama", "num_hidden_layers": 10**12},
            "the config asks for 1000000000000 layers",
        ),
        (
            {
                "model_type": "llama",
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
            },
            "tensors are missing, such as",
        ),
        ({"model_type": ["gpt2"]}, "no such thing as a causal language model"),
        ({"n_layer": None}, "n_layer: Input should be a valid integer"),
        ({"n_layer": 10**12}, "config.json says 1,000,000,000,000"),
        ({"n_embd": 2**40}, "config.json says 2 and [264, 1099511627776]"),
        ({"vocab_size": 2**62}, "config.json says"),
        ({"n_positions": 2**40}, "config.json says"),
        ({"n_positions": "16"}, "block_size: Input should be a valid integer"),
        ({"n_positions": -16}, "block_size: Input should be greater than 0"),
        ({"n_head": 0}, "n_head: Input should be greater than 0"),
        ({"n_head": 3}, "must be a multiple of n_head"),
        ({"llmtrain": [1]}, "is not a valid GPT-2 config"),
        ({"activation_function": ["gelu"]}, "activation_function ['gelu'] is not supported"),
    ],
)
def test_configs_of_foreign_models(workplace: Path, change: dict[str, Any], said: str) -> None:
    path = workplace / "run/snapshots/step-00000008/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused("eval", path.parent, "--tokens", 50, cwd=workplace, said=said)


@pytest.mark.parametrize(
    "key", ["model_type", "n_layer", "n_head", "n_embd", "vocab_size", "n_positions"]
)
def test_configs_that_lack_a_key(workplace: Path, key: str) -> None:
    path = workplace / "run/snapshots/step-00000008/config.json"
    document = json.loads(path.read_text())
    del document[key]
    path.write_text(json.dumps(document))
    said = "not gpt2" if key == "model_type" else f"'{key}' is missing or invalid"
    refused("eval", path.parent, "--tokens", 50, cwd=workplace, said=said)


# --- YAML and JSON ------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 10)}]}}\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "name: !!python/object/apply:os.system ['touch pwned']",
            "could not determine a constructor",
        ),
        ("!!python/object/new:os.system ['touch pwned']", "could not determine a constructor"),
        ("name: !!python/name:os.system", "could not determine a constructor"),
        (LAUGHS + "name: *i", "aliases expand to too many values"),
        (LAUGHS + "averages: *i", "aliases expand to too many values"),
        (LAUGHS + "? *i\n: 1", "aliases expand to too many values"),
        (MERGES, "aliases expand to too many values"),
        ("a: &a [*a]", "aliases expand to too many values"),
        ("a: " + "[" * 50_000, "not valid YAML"),
        ("- " * 20_000, "not valid YAML"),
        ("seed: " + "9" * 5_000, "not valid YAML"),
        ("{" * 5_000, "not valid YAML"),
        ("name: \x00", "not valid YAML"),
    ],
)
def test_configs(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    refused("pretrain", "--config", "c.yaml", cwd=tmp_path, said=said)
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("name", ["training.json", "config.json", "integrity.json"])
@pytest.mark.parametrize(
    "content", ["[" * 200_000, '{"a":' * 200_000, "9" * 5_000, '{"step": 1e999}', "\ud800", ""]
)
def test_json_of_a_run(workplace: Path, name: str, content: str) -> None:
    path = workplace / "run/snapshots/step-00000008" / name
    path.write_text(content, errors="surrogatepass")
    refused(
        "average", "run", "--every", "2", "--window", "2", "--out", "out", cwd=workplace, said=name
    )
    assert not (workplace / "out").exists()


@pytest.mark.parametrize(
    "name", ["../../../../../../etc/passwd", "/etc/passwd", "a/../../b", "a\0b"]
)
def test_a_record_that_names_other_files(workplace: Path, name: str) -> None:
    path = workplace / "run/snapshots/step-00000008/integrity.json"
    document = json.loads(path.read_text())
    document["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    path.write_text(json.dumps(document))
    said = "a file name points outside the folder"
    assert said in invoke("verify", path.parent, cwd=workplace).stdout
    refused("average", "run", "--every", "2", "--window", "2", cwd=workplace, said=said)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"step": 1, "loss": ' + "9" * 5_000 + "}", "line 1: not a JSON object"),
        ("[" * 200_000, "line 1: not a JSON object"),
        ("17", "line 1: not a JSON object"),
        ('["step"]', "line 1: not a JSON object"),
        ("\ud800", "line 1: not a JSON object"),
        ("{}", "line 1: invalid training event: step is None"),
        ('{"step": "1"}', "step is '1'"),
        ('{"step": -1}', "step is -1"),
        (f'{{"step": {10**30}}}', "step is 1000"),
        ('{"step": true}', "step is True"),
        ('{"step": 1, "val/loss": [1]}', "val/loss is [1]"),
        ('{"step": 1, "val/loss": "' + "x" * 10_000_000 + '"}', "val/loss is 'xxx"),
    ],
)
def test_lines_of_metrics(workplace: Path, line: str, said: str) -> None:
    path = workplace / "run/metrics.jsonl"
    path.write_text(f"{line}\n{path.read_text()}", errors="surrogatepass")
    refused("report", "run", cwd=workplace, said=said)


# --- data ---------------------------------------------------------------------------------------------


def lie(data: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and its hash with it."""
    path = data / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    document.pop("sha256", None)
    try:
        document["sha256"] = Manifest.model_validate_json(json.dumps(document)).sha256
    except ValueError:
        document["sha256"] = "0" * 64
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda d: d["train"]["shards"][0].update(name="../x.bin"),
            "shard 0 of train is called '../x.bin'",
        ),
        (
            lambda d: d["train"]["shards"][0].update(name="/etc/passwd"),
            "shard 0 of train is called",
        ),
        (
            lambda d: [d["train"].update(tokens=9), d["train"]["shards"][0].update(tokens=9)],
            "bytes instead of 1,042",
        ),
        (
            lambda d: [d["val"].update(tokens=2**70), d["val"]["shards"][0].update(tokens=2**70)],
            "bytes instead of",
        ),
        (
            lambda d: d["train"].update(tokens=-1),
            "train.tokens: Input should be greater than or equal to 0",
        ),
        (lambda d: d["tokenizer"].update(vocab_size=65536), "another byte tokenizer"),
        (lambda d: d["tokenizer"].update(vocab_size=10**9), "tokenizer.vocab_size"),
        (lambda d: d["tokenizer"].update(eot=0), "another byte tokenizer"),
        (lambda d: d["tokenizer"].update(name="../../x"), "unknown tokenizer '../../x'"),
        (lambda d: d.update(dtype="uint32"), "dtype: Extra inputs are not permitted"),
        (lambda d: d.update(train=None), "train: Input should be"),
    ],
)
def test_manifests_that_lie(
    workplace: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    lie(workplace / "data", change)
    refused("pretrain", "--config", "config.yaml", "--run-dir", "other", cwd=workplace, said=said)
    refused("eval", "run", cwd=workplace, said=said)
    assert not (workplace / "other").exists()


def test_evaluation_names_the_place_of_an_id_beyond_the_vocabulary(workplace: Path) -> None:
    shard = workplace / "data" / "val-00000.bin"
    content = bytearray(shard.read_bytes())
    content[1024 + 2 * 20 : 1024 + 2 * 22] = struct.pack(
        "<2H", 263, 300
    )  # 263: a row that only pads the model's
    shard.write_bytes(content)
    said = "val-00000.bin holds id 263 at token 20, beyond the vocabulary of 257"
    refused("eval", "run/snapshots/step-00000008", "--tokens", "64", cwd=workplace, said=said)


def test_training_names_an_id_beyond_the_vocabulary(workplace: Path) -> None:
    shard = workplace / "data" / "train-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:1024] + struct.pack("<H", 40_000) * (len(content) // 2 - 512))
    outcome = invoke("pretrain", "--config", "config.yaml", "--run-dir", "other", cwd=workplace)
    assert outcome.code == 2
    said = r"error: data/train-00000.bin holds id 40000 at token [\d,]+, beyond the vocabulary of 257\nhint: .*\n"
    assert re.fullmatch(said, outcome.stderr)
