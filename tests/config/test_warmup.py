"""The warm-up steps that `average` reads are those of the whole configuration."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.loading import dump_config, load_config
from llmtrain.config.recipes import list_recipes, read_recipe
from llmtrain.config.schema import RunConfig
from llmtrain.config.warmup import warmup_steps
from llmtrain.errors import UserError


@pytest.mark.parametrize("steps", [0, 7, 2000])
@pytest.mark.parametrize("name", ["constant", "cosine", "inverse-sqrt"])
def test_resolved_configurations(
    tiny: Callable[..., RunConfig], tmp_path: Path, name: str, steps: int
) -> None:
    schedule: dict[str, Any] = {"name": name, "warmup_steps": steps}
    config = tiny(schedule=schedule, train__max_steps=3000)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert warmup_steps(path) == load_config(path).schedule.warmup_steps == steps


@pytest.mark.parametrize("recipe", list_recipes())
def test_recipes(tmp_path: Path, recipe: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(read_recipe(recipe))
    assert warmup_steps(path) == load_config(path).schedule.warmup_steps


@pytest.mark.parametrize(
    "text",
    [
        "other:\n  warmup_steps: 3\nschedule: {warmup_steps: 9}\n",
        "schedule:\n  name: constant\nother:\n  warmup_steps: 3\n",
        "schedule:\n  warmup_steps: many\n",
        "\x00",
    ],
)
def test_other_files_are_checked_as_a_whole(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError):
        warmup_steps(tmp_path / "config.yaml")
    with pytest.raises(UserError):
        warmup_steps(tmp_path / "none.yaml")
