"""Fixtures of the averaging tests. Needs nothing but the package."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_runs import SHAPE, MakeRun, weights_at

from llmtrain.checkpoint import Origin, save_weights
from llmtrain.config import RunConfig
from llmtrain.config_file import dump_config
from llmtrain.files import RunFolder, staged_folder


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Write a run with snapshots at the given steps, as the trainer would."""

    def make(steps: Sequence[int], *, warmup: int = 0, name: str = "tiny") -> RunFolder:
        run = RunFolder(tmp_path / "runs" / name)
        run.path.mkdir(parents=True)
        config = RunConfig.model_validate(
            {
                "name": name,
                "data": {"path": "data/none", "block_size": SHAPE.block_size},
                "model": SHAPE.model.model_dump(),
                "schedule": {"name": "constant", "warmup_steps": warmup},
                "train": {"max_steps": max(steps), "batch_sequences": 4, "micro_batch": 4},
            }
        )
        run.config.write_text(dump_config(config))
        for step in steps:
            with staged_folder(run.snapshot(step)) as folder:
                save_weights(folder, weights_at(step), SHAPE, Origin(step, step * 64, 1e-3 / step, name))
        return run

    return make
