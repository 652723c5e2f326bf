"""The search for weights in training files, and the files that it rejects."""

import argparse
import collections
import pathlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from in_process import invoke, refused
from safetensors.torch import load_file
from torch import Tensor

from llmtrain.checkpoints.checkpoint import Checkpoint
from llmtrain.checkpoints.open import open_checkpoint
from llmtrain.checkpoints.state_dicts import read_state_dict, stored_position
from llmtrain.errors import UserError

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.arange(3.0)}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2, 3)}}, "param_groups": [{"params": [0]}]}
AVERAGE = ("average", "s", "--every", "10", "--window", "2")


def opened(folder: Path, document: object) -> Checkpoint:
    torch.save(document, folder / "ckpt.pt")
    return open_checkpoint(folder / "ckpt.pt", step=1)


def read(checkpoint: Checkpoint) -> dict[str, np.ndarray[Any, Any]]:
    with checkpoint.reader() as reader:
        return {
            name: reader.read(name, 0, spec.count, np.empty(spec.bytes, np.uint8)).copy()
            for name, spec in checkpoint.tensors.items()
        }


def test_a_loss_next_to_the_weights_is_not_the_model(tmp_path: Path) -> None:
    """The form in PyTorch's tutorial, with the loss as a tensor."""
    for step in (10, 20):
        document = {
            "epoch": step,
            "model_state_dict": {n: tensor + step for n, tensor in WEIGHTS.items()},
            "optimizer_state_dict": OPTIMIZER,
            "loss": torch.tensor(0.25),
        }
        (tmp_path / "s").mkdir(exist_ok=True)
        torch.save(document, tmp_path / "s" / f"step{step}.pt")
    outcome = invoke(*AVERAGE, "--out", "out", cwd=tmp_path)
    assert outcome.code == 0, outcome
    assert "warning" not in outcome.stderr
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == WEIGHTS.keys()
    assert all(torch.equal(got[name], tensor + 15) for name, tensor in WEIGHTS.items())


@pytest.mark.parametrize(
    "document",
    [
        WEIGHTS,
        WEIGHTS | {"step": 3},
        *({key: WEIGHTS, "optimizer": OPTIMIZER, "epoch": 1} for key in ("model", "net", "module")),
        {"model": {"state_dict": WEIGHTS, "arch": "x"}},
        {"model": {"name": "x"}, "state_dict": WEIGHTS},
        {"model": {f"module.{name}": tensor for name, tensor in WEIGHTS.items()}},
        {"model": {f"_orig_mod.{name}": tensor for name, tensor in WEIGHTS.items()}},
        {"model": {f"_orig_mod.module.{name}": tensor for name, tensor in WEIGHTS.items()}},
        {"model": {n.replace("a.", "a._orig_mod."): tensor for n, tensor in WEIGHTS.items()}},
        {"state_dict": collections.OrderedDict(WEIGHTS), "c": collections.Counter("aab")},
        {"model": WEIGHTS, "args": argparse.Namespace(lr=0.1), "shape": torch.Size([3])},
        {"model": {name: torch.nn.Parameter(tensor) for name, tensor in WEIGHTS.items()}},
    ],
)
def test_weights_are_found(tmp_path: Path, document: dict[str, Any]) -> None:
    checkpoint = opened(tmp_path, document)
    assert {n: tuple(spec.shape) for n, spec in checkpoint.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()
    }
    assert checkpoint.notes == ()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"model": WEIGHTS, "state_dict": WEIGHTS}, "under 'model', 'state_dict'"),
        ({"generator": WEIGHTS, "critic": WEIGHTS}, "under 'generator', 'critic'"),
        ({"head": torch.ones(3), "body": WEIGHTS}, "under 'body', next to plain tensors such as"),
        ({"model": {"g": WEIGHTS, "d": WEIGHTS}}, "under 'g', 'd'"),
        ({"model": WEIGHTS | {"layers": [torch.ones(2)]}}, "under 'layers', next to plain"),
        ({"epoch": 3, "loss": torch.tensor(0.1)}, "contains no weights; it has 'epoch', 'loss'"),
        ({"x\x1b[31m\n": {}}, r"it has 'x\\x1b\[31m\\n'"),
        ({"model": {}}, "contains no weights; it has 'model'"),
        ([torch.ones(3)], "contains no weights"),
        ({"model": {0: torch.ones(2), "0": torch.ones(2)}}, "contains 0 twice"),
    ],
)
def test_unclear_files_are_rejected(tmp_path: Path, document: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(tmp_path, document)


def test_entries_that_may_be_weights_are_reported_once(tmp_path: Path) -> None:
    for step in (10, 20):
        (tmp_path / "s").mkdir(exist_ok=True)
        state = {name: tensor + step for name, tensor in WEIGHTS.items()}
        document = {"state_dict": state, "state_dict_ema": state, "optimizer": OPTIMIZER}
        torch.save(document, tmp_path / "s" / f"step{step}.pt")
    outcome = invoke(*AVERAGE, cwd=tmp_path)
    assert outcome.code == 0
    assert outcome.stderr.count("not averaged: 'state_dict_ema'") == 1
    assert "optimizer" not in outcome.stderr


def test_a_tied_tensor_is_reported(tmp_path: Path) -> None:
    state = WEIGHTS | {"head": WEIGHTS["a.weight"]}
    checkpoint = opened(tmp_path, {"model": state})
    (note,) = checkpoint.notes
    assert "stored once: head (in a.weight)" in note
    assert checkpoint.tensors.keys() == WEIGHTS.keys()


def test_cyclic_and_shared_containers_take_no_time(tmp_path: Path) -> None:
    cyclic: dict[str, Any] = {"epoch": 1}
    cyclic["model"] = cyclic
    with pytest.raises(UserError, match="contains no weights"):
        opened(tmp_path, cyclic)
    shared: list[Any] = [1]
    for _ in range(100):  # 2^100 paths
        shared = [shared, shared]
    assert opened(tmp_path, {"model": WEIGHTS, "shared": shared}).tensors.keys() == WEIGHTS.keys()


@pytest.mark.filterwarnings("ignore")  # torch announces that some of these will be removed
@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "qint8"),
        (lambda: torch.ones(3, dtype=torch.complex64), "complex64"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        (lambda: torch.empty(3, device="meta"), "device is meta"),
        (lambda: torch.ones(3).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda: torch.ones(1).expand(2**20, 2**20), "more than the file"),
    ],
)
def test_tensors_without_plain_numbers_are_rejected(
    tmp_path: Path, make: Callable[[], Tensor], problem: str
) -> None:
    with pytest.raises(UserError, match=f"w cannot be read: .*{problem}"):
        opened(tmp_path, {"model": {"w": make()}})


@pytest.mark.parametrize("name", ["a\ud800", "__metadata__"])
def test_names_that_safetensors_cannot_store_are_rejected(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="does not allow this name"):
        opened(tmp_path, {"model": {name: torch.ones(3)}})


def test_views_are_read_as_their_numbers(tmp_path: Path) -> None:
    base = torch.arange(20.0)
    complex_numbers = torch.tensor([1 + 2j, 3 + 4j])
    views = {
        "overlap": base[5:15],
        "transposed": base.view(4, 5).t(),
        "negated": complex_numbers.conj().imag,
        "expanded": base[:1].expand(4),
        "unsigned": torch.tensor([1, 65535], dtype=torch.uint16),
    }
    got = read(opened(tmp_path, {"model": views | {"base": base}}))
    for name, tensor in views.items():
        assert got[name].tolist() == tensor.reshape(-1).tolist(), name


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (argparse.Namespace(out=pathlib.PosixPath("x")), "pathlib.PosixPath"),
        (np.float64(3), "multiarray.scalar"),
        (collections.defaultdict(list), "collections.defaultdict"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
)
def test_a_rejected_class_is_named(tmp_path: Path, value: object, name: str) -> None:
    for step in (10, 20):
        (tmp_path / "s").mkdir(exist_ok=True)
        torch.save({"model": WEIGHTS, "args": value}, tmp_path / "s" / f"step{step}.pt")
    refused(*AVERAGE, cwd=tmp_path, expected=name)


def test_a_compressed_archive_is_rejected(tmp_path: Path) -> None:
    """Otherwise compressed bytes would be mapped as numbers, although the sizes look right."""
    torch.save({"model": {"w": torch.ones(500)}}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "ckpt.pt", "w") as packed,
    ):
        for entry in plain.namelist():
            kind = zipfile.ZIP_DEFLATED if entry.endswith("/version") else zipfile.ZIP_STORED
            packed.writestr(entry, plain.read(entry), kind)
    with pytest.raises(UserError, match="it is compressed"):
        open_checkpoint(tmp_path / "ckpt.pt", step=1)


def test_legacy_and_truncated_files_are_named(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(WEIGHTS, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-100])
    for name in ("old.pt", "cut.pt"):
        with pytest.raises(UserError, match=f"{name} as tensors: it is damaged, or was written"):
            open_checkpoint(tmp_path / name, step=1)


@pytest.mark.parametrize(
    ("document", "position"),
    [
        ({"global_step": 7, "epoch": 2}, (0, 7)),
        ({"iter_num": 7}, (0, 7)),
        ({"epoch": 2, "step": 7}, (2, 7)),
        ({"epoch": 2}, (2, 0)),
        ({"step": 7}, (0, 7)),
        ({"step": True, "epoch": "2"}, None),
        ([], None),
    ],
)
def test_stored_position(document: object, position: tuple[int, int] | None) -> None:
    assert stored_position(document) == position


LEAVES = st.sampled_from([1, "x", None, torch.ones(2), torch.tensor(0.5), torch.arange(3)])
KEYS = st.sampled_from(["model", "state_dict", "module.w", "w", "_orig_mod.w", "optimizer", "ema"])
DOCUMENTS = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(DOCUMENTS)
def test_any_document_gives_its_own_tensors_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, document: object
) -> None:
    """All tensors come from one entry of the file, and none of that entry is missing."""
    path = tmp_path_factory.getbasetemp() / "any.pt"
    path.write_bytes(bytes(1000))
    try:
        found = read_state_dict(path, document).tensors
    except UserError:
        return
    entries: Any = document
    while chosen := [k for k in ("model", "state_dict") if isinstance(entries.get(k), dict)]:
        with_tensors = [k for k in chosen if "tensor(" in repr(entries[k])]
        if not with_tensors:
            break
        (key,) = with_tensors
        entries = entries[key]
    own = [value for value in entries.values() if isinstance(value, Tensor)]
    assert len(found) == len(own) > 0
    assert all(torch.equal(a, b) for a, b in zip(found.values(), own, strict=True))
