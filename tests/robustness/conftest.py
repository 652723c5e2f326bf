"""A trained run that the tests of robustness copy and damage."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.checkpoints.resolve import find_targets
from llmtrain.config.loading import dump_config
from llmtrain.config.schema import RunConfig
from llmtrain.evaluation.loss import measure_losses
from llmtrain.evaluation.options import EvalOptions
from llmtrain.training.run import pretrain


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory, data_folder: Path, tiny: Callable[..., RunConfig]
) -> Path:
    """A folder with data, text, a config, and its run with averages and results."""
    place = tmp_path_factory.mktemp("robustness") / "trained"
    shutil.copytree(data_folder, place / "data")
    (place / "text.txt").write_text("some text " * 50)
    averages = [{"kind": "ema", "decay": 0.9, "save_every": 4}, {"kind": "running-mean"}]
    config = tiny(name="run", data__path="data", train__max_steps=8, averages=averages)
    (place / "config.yaml").write_text(dump_config(config))
    (place / "runs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        pretrain(config, Path("runs/run"), log=lambda line: None)
        targets = find_targets(Path("runs/run"), every_snapshot=False)
        measure_losses(targets, EvalOptions(), lambda *progress: None)
    return place


@pytest.fixture
def workplace(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained` to be damaged."""
    return shutil.copytree(trained, tmp_path / "place")
