"""Hostile weights, configs and torch files: refused with a message and a hint, nothing executed."""

import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import invoke, refused
from safetensors.torch import save_file
from tiny_runs import SHAPE, weights_at

from llmtrain.checkpoints.gpt2_folder import Origin, save_weights

AVERAGE = ("average", "s", "--every", "10", "--window", "2")


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
    ("write", "expected"),
    [
        (pickle_bomb, "as tensors"),
        (plain_pickle_bomb, "as tensors"),
        pytest.param(zip_bomb, "unpacks to more bytes than the file has", marks=pytest.mark.slow),
        (absurd_storage, "as tensors"),
        (absurd_view, "4,398,046,511,104 bytes"),
    ],
)
def test_files_of_torch(
    tmp_path: Path, write: Callable[[Path], None], expected: str, name: str
) -> None:
    for step in (10, 20):
        path = tmp_path / "s" / name.format(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    refused(*AVERAGE, cwd=tmp_path, expected=expected)
    assert not (tmp_path / "pwned").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"s"}


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
    expected = (
        "tensor 'a' has the unsupported dtype" if name == "unsupported dtype" else "cannot read"
    )
    refused(*AVERAGE, cwd=tmp_path, expected=expected)
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
    expected = "index.json places" if name != ".." else "not the name of"
    refused(*AVERAGE, cwd=tmp_path, expected=expected)
    refused("inspect", "s", cwd=tmp_path, expected=expected)
    expected = "not the name of a .safetensors file"
    refused("eval", "s/step10", "--data", data_folder, cwd=tmp_path, expected=expected)


def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "secret.safetensors")
    for step in (10, 20):
        (tmp_path / "s" / f"step{step}").mkdir(parents=True)
        (tmp_path / "s" / f"step{step}" / "model.safetensors").symlink_to(
            tmp_path / "secret.safetensors"
        )
    refused(*AVERAGE, cwd=tmp_path, expected="a link to a file outside")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers(tmp_path: Path, data_folder: Path, value: float) -> None:
    for step in (10, 20):
        weights = weights_at(step)
        weights["transformer.wpe.weight"][3, 5] = value
        (tmp_path / "s" / f"step{step}").mkdir(parents=True)
        save_weights(tmp_path / "s" / f"step{step}", weights, SHAPE, Origin(step, step, 0.1, "x"))
    expected = f"transformer.wpe.weight contains {value} at [3, 5]"
    refused(*AVERAGE, cwd=tmp_path, expected=expected)


def test_a_loss_that_is_no_number(workplace: Path) -> None:
    path = workplace / "runs/run/snapshots/step-00000008/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:] = np.float32("nan").tobytes()
    path.write_bytes(content)
    path.with_name("integrity.json").unlink()
    refused("eval", path.parent, cwd=workplace, expected="the loss of", code=1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(
            {"model_type": "llama"},  # a LLaMA of default size
            "the config asks for 6,477,352,960 parameters",
            marks=pytest.mark.slow,
        ),
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
        ({"model_type": ["gpt2"]}, "could not load a causal language model"),
        ({"n_layer": None}, "n_layer: Input should be a valid integer"),
        ({"n_layer": 10**12}, "config.json says [1000000000000, "),
        ({"n_embd": 2**40}, "config.json says [2, [264, 1099511627776]"),
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
def test_configs_of_foreign_models(workplace: Path, change: dict[str, Any], expected: str) -> None:
    path = workplace / "runs/run/snapshots/step-00000008/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    path.with_name("integrity.json").unlink()
    refused("eval", path.parent, "--tokens", 50, cwd=workplace, expected=expected)


@pytest.mark.parametrize(
    "key", ["model_type", "n_layer", "n_head", "n_embd", "vocab_size", "n_positions"]
)
def test_configs_that_lack_a_key(workplace: Path, key: str) -> None:
    path = workplace / "runs/run/snapshots/step-00000008/config.json"
    document = json.loads(path.read_text())
    del document[key]
    path.write_text(json.dumps(document))
    path.with_name("integrity.json").unlink()
    expected = "model_type None" if key == "model_type" else "is not a valid GPT-2 config"
    refused("eval", path.parent, "--tokens", 50, cwd=workplace, expected=expected)
