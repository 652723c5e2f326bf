"""A run that ended before its first step does not claim its folder; one with progress does."""

from pathlib import Path
from typing import Any

import pytest
from tiny_training import Build, assert_same_run, quiet

from llmtrain.config.loading import load_config
from llmtrain.errors import UserError
from llmtrain.storage.run_folder import RunFolder, step_folders
from llmtrain.training.trainer import Trainer

REWIND = {"action": "rewind", "rewind_steps": 4}


class KilledError(Exception):
    """A simulated kill."""


def kill_before_first_step(config: Any, folder: Path, **options: Any) -> None:
    def killed(*_: Any) -> None:
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", killed)
        with pytest.raises(KilledError):
            quiet(config, folder, **options)


@pytest.mark.parametrize("policy", ["log", "rewind"])
def test_a_run_that_never_trained_does_not_claim_its_folder(
    tiny: Build, tmp_path: Path, policy: str
) -> None:
    """With rewinds, such a run contains a training checkpoint at step 0."""
    spikes, config = REWIND | {"action": policy}, tiny(optimizer={"lr": 5e-3}, spikes=REWIND)
    kill_before_first_step(tiny(spikes=spikes), tmp_path / "run")
    warnings: list[str] = []
    run = quiet(config, tmp_path / "run", warn=warnings.append)
    assert [line for line in warnings if "never trained: replacing its config" in line]
    assert load_config(run.config) == config
    assert_same_run(quiet(config, tmp_path / "whole"), run)


def test_a_branch_that_never_trained_can_start_from_another_checkpoint(
    tiny: Build, tmp_path: Path
) -> None:
    """Such a branch contains the weights and the training checkpoint of its parent."""
    trunk = quiet(tiny(checkpoint__keep_states=3), tmp_path / "trunk")
    config = tiny(optimizer={"lr": 5e-3})
    kill_before_first_step(tiny(), tmp_path / "branch", resume=trunk.state(8))
    assert list(step_folders(RunFolder(tmp_path / "branch").snapshots)) == [8]
    kill_before_first_step(config, tmp_path / "branch", resume=trunk.state(4))
    branch = quiet(config, tmp_path / "branch")  # the same config continues the branch
    assert_same_run(quiet(config, tmp_path / "whole", resume=trunk.state(4)), branch)
    assert list(step_folders(branch.snapshots)) == [4, 6, 8, 10, 12]


@pytest.mark.parametrize("progress", ["event", "snapshot", "checkpoint", "average", "rewound"])
def test_a_run_with_any_progress_keeps_its_folder(
    tiny: Build, tmp_path: Path, progress: str
) -> None:
    kill_before_first_step(tiny(), tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    saved = {"snapshot": run.snapshot(2), "checkpoint": run.state(4)}
    saved |= {"average": run.average("ema-0.9", 4)}
    saved |= {"rewound": run.snapshots / "step-00000002-rewound"}
    if progress in saved:
        saved[progress].mkdir(parents=True)
    else:
        run.metrics.write_text('{"step": 1, "loss": 5.0, "lr": 0.01}\n')
    before = run.config.read_bytes()
    with pytest.raises(UserError, match="was trained with another config"):
        quiet(tiny(optimizer={"lr": 5e-3}), run.path)
    assert run.config.read_bytes() == before


def test_a_branch_without_steps_is_refused(tiny: Build, tmp_path: Path) -> None:
    trunk = quiet(tiny(), tmp_path / "trunk")
    with pytest.raises(UserError, match=r"from step 12 to train.max_steps 12") as caught:
        quiet(tiny(), tmp_path / "branch", resume=trunk.state(12))
    assert "train.max_steps" in caught.value.hint
    assert not (tmp_path / "branch").exists()


def test_a_snapshot_is_not_a_training_checkpoint(tiny: Build, tmp_path: Path) -> None:
    trunk = quiet(tiny(), tmp_path / "trunk")
    for weights in (trunk.snapshot(8), trunk.average("ema-0.9", 8)):
        with pytest.raises(UserError, match="contains weights, not a training ch") as caught:
            quiet(tiny(), tmp_path / "branch", resume=weights)
        assert f"init_from={weights}" in caught.value.hint
        assert str(trunk.state(8)) in caught.value.hint
