"""Configurations to estimate; their data does not exist."""

from collections.abc import Callable
from typing import Any

import pytest

from llmtrain.config.schema import RunConfig


@pytest.fixture
def planned() -> Callable[..., RunConfig]:
    """Build a configuration; keyword `section__key` overrides a key."""

    def build(**overrides: Any) -> RunConfig:
        values: dict[str, Any] = {
            "name": "planned",
            "data": {"path": "data/none", "block_size": 64},
            "model": {"n_layer": 3, "n_head": 4, "n_embd": 128, "vocab_size": 264},
            "schedule": {"name": "constant", "warmup_steps": 1},
            "train": {"max_steps": 100, "batch_sequences": 64, "micro_batch": 2},
            "eval": {"every": 1000, "tokens": 512, "batch": 1},
        }
        for key, value in overrides.items():
            section, _, name = key.partition("__")
            values[section] = values.get(section, {}) | {name: value} if name else value
        return RunConfig.model_validate(values)

    return build
