"""Headers of safetensors files: agreement with the library, and rejection of damaged files."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from llmtrain.checkpoints.safetensors_files import encode_header, read_header
from llmtrain.checkpoints.tensors import TensorSpec
from llmtrain.errors import UserError


def _file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_read_header_of_a_file_from_the_library(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6, dtype=torch.float32).view(2, 3),
        "a": torch.arange(4, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    found, metadata = read_header(path)
    assert metadata == {"format": "pt"}
    assert {name: t.shape for name, t in found.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    stored = found["b"]
    assert (
        path.read_bytes()[stored.start : stored.start + stored.bytes]
        == tensors["b"].numpy().tobytes()
    )


def test_library_reads_an_encoded_header(tmp_path: Path) -> None:
    specs = {
        "ü": TensorSpec("F32", (2,)),
        "n": TensorSpec("I64", ()),
        "none": TensorSpec("F16", (0,)),
    }
    header, places = encode_header(specs, {"format": "pt"})
    assert len(header) % 8 == 0
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + struct.pack("<ffq", 1.5, -2.0, 9))
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("ü").tolist() == [1.5, -2.0]
        assert file.get_tensor("n").item() == 9
    found, _ = read_header(path)
    assert found == places
    assert [spec.start for spec in found.values()] == [spec.start for spec in places.values()]


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"not json at all", b""),
        (b"[" * 100_000, b""),
        ([], b""),
        ({"a": 3}, b""),
        ({"a": ENTRY}, b"1234567"),
        ({"a": ENTRY}, b"123456789"),
        ({"a": ENTRY | {"dtype": "F4"}}, b"12345678"),
        ({"a": ENTRY | {"shape": [-2]}}, b"12345678"),
        ({"a": ENTRY | {"shape": [True, 2]}}, b"12345678"),
        ({"a": ENTRY | {"shape": [3]}}, b"12345678"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, b"12345678"),
        ({"a": ENTRY | {"data_offsets": [0, 8, 9]}}, b"12345678"),
        ({"a": ENTRY, "b": ENTRY}, b"12345678"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, b"123456789012"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 20]}}, b"12345678901234567890"),
        (b'{"a": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}, "a": 1}', b""),
        ({"__metadata__": {"a": 1}}, b""),
    ],
)
def test_damaged_header_is_rejected(tmp_path: Path, header: object, data: bytes) -> None:
    path = _file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(UserError, match=r"bad\.safetensors"):
        read_header(path)


@pytest.mark.parametrize(
    "content", [b"", b"1234", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 0)]
)
def test_header_longer_than_the_file_is_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="header"):
        read_header(path)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.safetensors"):
        read_header(tmp_path / "gone.safetensors")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(flip=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_flipped_bit_raises_only_user_errors(tmp_path: Path, flip: int, bit: int) -> None:
    path = tmp_path / "x.safetensors"
    header, _ = encode_header(
        {"a": TensorSpec("F32", (2,)), "b": TensorSpec("BF16", (3, 2))}, {"format": "pt"}
    )
    content = bytearray(header + bytes(20))
    content[flip % len(header)] ^= 1 << bit
    path.write_bytes(content)
    try:
        read_header(path)
    except UserError as error:
        assert "x.safetensors" in str(error)
