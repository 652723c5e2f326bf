"""Formats: one entry adds a checkpoint format to every command."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmtrain.checkpoints import open as formats
from llmtrain.checkpoints.checkpoint import Checkpoint, Reader
from llmtrain.checkpoints.resolve import find_series
from llmtrain.checkpoints.tensors import StoredArray, TensorSpec
from llmtrain.errors import UserError


class NpyReader(Reader):
    """Reader of one array, which is the tensor `w`."""

    def __init__(self, path: Path) -> None:
        self._array: NDArray[Any] = np.load(path)

    def read(self, name: str, start: int, stop: int, buffer: NDArray[np.uint8]) -> StoredArray:
        return self._array[start:stop]


def open_npy(path: Path, step: int, location: str) -> Checkpoint:
    layout = {"model.safetensors": {"w": TensorSpec("F64", (3,))}}
    return Checkpoint(step, location, path.parent, layout, (path,), lambda: NpyReader(path))


def test_new_format_needs_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = formats.Format("x.npy", (".npy",), open_npy)
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, entry))
    for step in (10, 20):
        np.save(tmp_path / f"step{step}.npy", np.full(3, float(step)))
    series = find_series(str(tmp_path))
    assert series.steps == [10, 20]
    with series.inputs[20].open().reader() as reader:
        assert reader.read("w", 1, 3, np.empty(16, np.uint8)).tolist() == [20.0, 20.0]


def test_unsupported_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "step10.onnx").touch()
    assert not formats.is_checkpoint(tmp_path / "step10.onnx")
    with pytest.raises(UserError, match="contains no weights"):
        formats.open_checkpoint(tmp_path / "step10.onnx", step=10)
