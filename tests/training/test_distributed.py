"""Several processes train what one would: the same numbers, and states that any number can go on from."""

from pathlib import Path
from typing import Any

import pytest
from tiny_training import EVERY_AVERAGE, Build, events, quiet
from worlds import train_together

from llmtrain.config import RunConfig
from llmtrain.files import RunFolder

SPREADS = [("ddp", 2, 1), ("ddp", 4, 1), ("fsdp", 2, 1), ("fsdp", 4, 1), ("hsdp", 4, 2)]
"""How weights lie, processes, machines."""
REDUCTION = 1e-5
"""Relative: what float32 loses when numbers are added up in another order, 40 steps long."""


@pytest.fixture(scope="module")
def forty_steps(tiny: Build) -> RunConfig:
    return tiny(
        train__max_steps=40,
        train__micro_batch=2,
        optimizer={"lr": 3e-3},
        schedule={"name": "constant", "warmup_steps": 5},
        checkpoint={"snapshot_every": 10, "state_every": 10},
        averages=EVERY_AVERAGE,
        eval={"every": 10, "batch": 3},
        log={"every": 1},
    )


@pytest.fixture(scope="module")
def alone(forty_steps: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run of one process."""
    return quiet(forty_steps, tmp_path_factory.mktemp("alone") / "run")


def with_train(config: RunConfig, **settings: Any) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})


def assert_agree(one: RunFolder, other: RunFolder) -> None:
    """Same events, and every loss and norm in them to the error of a reduction."""
    expected, got = events(one), events(other)
    assert [event.keys() for event in got] == [event.keys() for event in expected]
    for there, here in zip(expected, got, strict=True):
        assert here == pytest.approx(there, rel=REDUCTION)
    assert sorted(p.relative_to(one.path) for p in one.path.rglob("model.safetensors")) == sorted(
        p.relative_to(other.path) for p in other.path.rglob("model.safetensors")
    )


@pytest.mark.parametrize(("parallel", "size", "machines"), SPREADS)
def test_the_curve_is_that_of_one_process(
    forty_steps: RunConfig, alone: RunFolder, tmp_path: Path, parallel: str, size: int, machines: int
) -> None:
    config = with_train(forty_steps, parallel=parallel)
    train_together(size, config, tmp_path / "run", machines)
    assert_agree(alone, RunFolder(tmp_path / "run"))
