"""The estimated disk usage against a real run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.config.schema import RunConfig
from llmtrain.planning.sizes import disk_usage
from llmtrain.training import checkpoint_writer as state_writer
from llmtrain.training.run import pretrain

Build = Callable[..., RunConfig]

AVERAGES = [
    {"kind": "ema", "decay": 0.9},
    {"kind": "ema", "decay": 0.5, "every": 5, "save_every": 4},
    {"kind": "swa", "start": 9},
    {"kind": "lawa", "window": 3, "every": 2, "save_every": 2},
    {"kind": "running-mean"},
    {"kind": "power-ema", "sigma_rel": 0.1, "start": 9},
]


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize(("bias", "optimizer"), [(False, "muon"), (True, "adamw")])
def test_a_run_writes_the_estimated_bytes(
    planned: Build,
    data_folder: Path,
    tmp_path: Path,
    bias: bool,
    optimizer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = planned(
        data={"path": str(data_folder), "block_size": 16},
        model__bias=bias,
        optimizer={"name": optimizer},
        schedule__warmup_steps=3,
        train={
            "max_steps": 15,
            "batch_sequences": 2,
            "micro_batch": 2,
            "compile": False,
            "device": "cpu",
        },
        checkpoint={"snapshot_every": 2, "state_every": 4, "keep_states": 2},
        averages=AVERAGES,
    )
    fullest = 0
    remove = state_writer.remove_folder

    def measuring(folder: Path) -> None:
        nonlocal fullest
        fullest = max(fullest, on_disk(tmp_path / "run"))
        remove(folder)

    monkeypatch.setattr(state_writer, "remove_folder", measuring)
    pretrain(config, tmp_path / "run", log=lambda line: None)
    storage = disk_usage(config)
    for saved in (storage.snapshots, *storage.averages, storage.states):
        folder = tmp_path / "run" / ("state" if saved.label == "states" else saved.label)
        assert len(list(folder.glob("step-*"))) == saved.count, saved.label
        assert saved.bytes == pytest.approx(on_disk(folder), rel=0.01), saved.label
    assert storage.total == pytest.approx(on_disk(tmp_path / "run"), rel=0.01)
    assert storage.largest == pytest.approx(fullest, rel=0.01)


def test_a_run_that_may_rewind_saves_its_first_state(planned: Build) -> None:
    checkpoint = {"state_every": 400, "keep_states": 2}
    steady = planned(checkpoint=checkpoint)
    assert disk_usage(steady).largest == disk_usage(steady).total
    rewinding = planned(checkpoint=checkpoint, train__on_nonfinite="rewind")
    assert disk_usage(rewinding).states.count == 2
