"""Damaged weights of a committed folder are refused by every command that loads them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from in_process import invoke, refused
from safetensors.torch import load_file, save_file

from llmtrain.checkpoints import gpt2_folder
from llmtrain.errors import UserError
from llmtrain.evaluation.hf_models import load_transformers
from llmtrain.storage.integrity import write_integrity
from llmtrain.storage.json_files import write_json

STEP = "runs/run/snapshots/step-00000008"
AVERAGE = ("average", "runs/run", "--every", "2", "--window", "2")

COMMANDS: dict[str, tuple[str, ...]] = {
    "eval": ("eval", STEP),
    "eval --text": ("eval", STEP, "--text", "text.txt"),
    "generate": ("generate", STEP, "--prompt", "a", "--max-tokens", "2"),
    "export": ("export", STEP, "--to", "exported"),
    "export nanogpt": ("export", STEP, "--to", "exported", "--format", "nanogpt"),
    "inspect": ("inspect", STEP),
    "inspect run": ("inspect", "runs/run"),
    "average": AVERAGE,
    "sweep": (*AVERAGE[:2], "--sweep", "window=2 every=2", "--at", "last"),
    "init_from": ("pretrain", "--config", "new.yaml", "--run-dir", "runs/new"),
}


def flip(path: Path) -> None:
    """Flip 250 bits, and restore the times."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    start = len(content) // 2
    for position in range(start, start + 4 * 250, 4):
        content[position] ^= 1  # the lowest bits of float32: all numbers stay finite
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replace(path: Path) -> None:
    """Overwrite the file with that of another step, including the times."""
    shutil.copy2(path.parents[1] / "step-00000004" / path.name, path)


def change_config(path: Path) -> None:
    """Change the meaning of the weights, but not the size of the file."""
    config = path.with_name("config.json")
    text = config.read_text().replace('"scale_attn_by_inverse_layer_idx": true', "%s")
    assert "%s" in text
    config.write_text(text.replace("%s", '"scale_attn_by_inverse_layer_idx": null'))


def shadow_shards(path: Path) -> None:
    """Add `model.safetensors`, which takes precedence over the committed shards."""
    tensors, names = load_file(path), sorted(load_file(path))
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        save_file(
            {n: tensors[n] for n in part},
            path.with_name(f"model-{number:05d}-of-00002.safetensors"),
        )
    weight_map = {n: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, n in enumerate(names)}
    write_json(path.with_name("model.safetensors.index.json"), {"weight_map": weight_map})
    path.unlink()
    write_integrity(path.parent)
    gpt2_folder.load_model(path.parent)
    save_file({n: t * 2 for n, t in tensors.items()}, path)


@pytest.mark.parametrize("damage", [flip, replace, change_config, shadow_shards])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse(workplace: Path, command: str, damage: Callable[[Path], None]) -> None:
    config = (workplace / "config.yaml").read_text()
    (workplace / "new.yaml").write_text(config.replace("init_from: null", f"init_from: {STEP}"))
    before = {path.name for path in (workplace / "runs/run/evals").rglob("*")}
    path = workplace / STEP / "model.safetensors"
    damage(path)
    name = "config.json" if damage is change_config else path.name
    expected = "is not in the integrity.json" if damage is shadow_shards else "the recorded BLAKE3"
    outcome = invoke(*COMMANDS[command], cwd=workplace)
    assert outcome.code == 2
    assert outcome.stdout == "" or command == "init_from"  # which prints its configuration
    assert f"step-00000008/{name} " in outcome.stderr
    assert expected in outcome.stderr
    assert not (workplace / "exported").exists()
    assert not list((workplace / "runs/run/averages").glob("lawa*/step*"))
    assert {path.name for path in (workplace / "runs/run/evals").rglob("*")} == before


def test_records_of_earlier_versions_are_checked_with_sha256(workplace: Path) -> None:
    import hashlib
    import json

    path = workplace / STEP / "model.safetensors"
    record = path.with_name("integrity.json")
    files = {
        each.name: {
            "bytes": each.stat().st_size,
            "sha256": hashlib.sha256(each.read_bytes()).hexdigest(),
        }
        for each in path.parent.iterdir()
        if each != record
    }
    record.write_text(json.dumps({"files": files}))
    gpt2_folder.load_model(path.parent)
    flip(path)
    refused("eval", STEP, cwd=workplace, expected="does not have the recorded SHA-256")


def test_transformers_reads_intact_weights_only(workplace: Path) -> None:
    load_transformers(workplace / STEP)
    flip(workplace / STEP / "model.safetensors")
    with pytest.raises(UserError, match="the recorded BLAKE3"):
        load_transformers(workplace / STEP)


def test_loads_what_safetensors_loads(workplace: Path) -> None:
    """All dtypes, a scalar and an empty tensor, in the order of the file."""
    folder = workplace / STEP
    tensors = {
        "a": torch.tensor(1.5),
        "b": torch.zeros(0, 3),
        "c": torch.arange(4, dtype=torch.bfloat16),
        "d": torch.tensor([True, False]),
        "e": torch.arange(600_000).view(2, -1),
    }
    save_file(tensors, folder / "model.safetensors")
    write_integrity(folder)
    loaded = gpt2_folder.load_weights(folder)
    assert loaded.keys() == {f"transformer.{name}" for name in tensors}
    for name, tensor in tensors.items():
        found = loaded[f"transformer.{name}"]
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
