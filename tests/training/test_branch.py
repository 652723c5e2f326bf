"""Branches: runs that start from a training checkpoint of another run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import EVERY_AVERAGE, Build, assert_same_run, events, quiet

from llmtrain.checkpoints.gpt2_folder import load_weights
from llmtrain.errors import UserError
from llmtrain.storage.run_folder import RunFolder, step_folders
from llmtrain.training.run import pretrain
from llmtrain.training.trainer import Trainer


@pytest.mark.slow
def test_a_branch_starts_from_a_checkpoint_and_records_its_parent(
    tiny: Build, tmp_path: Path
) -> None:
    trunk = quiet(tiny(), tmp_path / "trunk")
    cooldown = tiny(
        schedule={"name": "wsd", "warmup_steps": 2, "decay_steps": 4},
        averages=[*EVERY_AVERAGE[:1], {"kind": "running-mean"}],
    )
    branch = quiet(cooldown, tmp_path / "branch", resume=trunk.state(8))
    assert list(step_folders(branch.snapshots)) == [8, 10, 12]
    assert [e["step"] for e in events(branch)] == [9, 12, 12]
    parent = json.loads(branch.parent.read_text())
    assert (parent["run"], parent["step"]) == (str(trunk.path), 8)
    assert parent["changed"]["schedule.name"] == ["constant", "wsd"]
    # The branch differs from the trunk's continuation; a branch without changes does not.
    ours, theirs = load_weights(branch.snapshot(12)), load_weights(trunk.snapshot(12))
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    same = quiet(tiny(), tmp_path / "same", resume=trunk.state(8))
    assert (same.snapshot(12) / "model.safetensors").read_bytes() == (
        trunk.snapshot(12) / "model.safetensors"
    ).read_bytes()
    # The same command resumes the branch; another checkpoint is refused.
    assert pretrain(
        cooldown, branch.path, resume=trunk.state(8), log=lambda line: None
    ).already_finished
    with pytest.raises(UserError, match="did not start from"):
        quiet(cooldown, branch.path, resume=trunk.state(12))
    (tmp_path / "moved").mkdir()
    moved = [each.path.rename(tmp_path / "moved" / each.path.name) for each in (trunk, branch)]
    assert pretrain(
        cooldown, moved[1], resume=RunFolder(moved[0]).state(8), log=lambda _: None
    ).already_finished


@pytest.mark.slow
def test_an_average_added_by_a_branch_starts_there(tiny: Build, tmp_path: Path) -> None:
    """Its provenance contains the start, also after a resume."""
    trunk = quiet(tiny(), tmp_path / "trunk")
    averages = [
        {"kind": "ema", "save_every": 4},
        {"kind": "running-mean", "every": 2},
        EVERY_AVERAGE[-1],
    ]
    for steps in (12, 14):
        run = quiet(
            tiny(averages=averages, train__max_steps=steps), tmp_path / "run", resume=trunk.state(8)
        )
        for label, start in (("ema-0.9", 1), ("running-mean", 8), ("power-ema-0.1", 8)):
            about = json.loads((run.average(label, steps) / "provenance.json").read_text())
            assert about["start"] == start


@pytest.mark.slow
def test_a_branch_killed_before_its_first_checkpoint_resumes_exactly(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = quiet(tiny(), tmp_path / "trunk")
    config = tiny(optimizer={"lr": 5e-3})
    whole = quiet(config, tmp_path / "whole", resume=trunk.state(8))

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            quiet(config, tmp_path / "parts", resume=trunk.state(8))
    assert_same_run(whole, quiet(config, tmp_path / "parts"))
    # `parent.json` without a config does not turn a new run into a branch.
    (tmp_path / "new").mkdir()
    shutil.copy(whole.parent, tmp_path / "new")
    assert not quiet(config, tmp_path / "new").parent.exists()
    # With checkpoints of its own it needs no parent; if they are lost, it does not restart.
    parts = RunFolder(tmp_path / "parts")
    shutil.rmtree(trunk.path)
    quiet(tiny(optimizer={"lr": 5e-3}, train__max_steps=14), parts.path)
    shutil.rmtree(parts.states)
    with pytest.raises(UserError, match="step-00000008 is not a training checkpoint"):
        quiet(config, parts.path)


def test_a_branch_needs_a_checkpoint_of_its_model(tiny: Build, tmp_path: Path) -> None:
    trunk = quiet(tiny(), tmp_path / "trunk")
    with pytest.raises(UserError, match="is not a training checkpoint"):
        quiet(tiny(), tmp_path / "branch", resume=trunk.state(3))
    with pytest.raises(UserError, match="is not a training checkpoint") as caught:
        quiet(tiny(), tmp_path / "branch", resume=trunk.path)
    assert caught.value.hint is not None and str(trunk.state(8)) in caught.value.hint
    with pytest.raises(UserError, match=r"another model: model.n_layer"):
        quiet(tiny(model__n_layer=1), tmp_path / "branch", resume=trunk.state(8))
    assert not (tmp_path / "branch").exists()
    shutil.copytree(trunk.state(8), tmp_path / "elsewhere" / "state" / "step-00000008")
    with pytest.raises(UserError, match="elsewhere is not a run"):
        quiet(
            tiny(), tmp_path / "branch", resume=tmp_path / "elsewhere" / "state" / "step-00000008"
        )
