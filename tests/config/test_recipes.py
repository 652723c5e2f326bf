"""Included recipes, and the commands `recipes` and `config`."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import invoke
from places import REPOSITORY

from llmtrain import __version__
from llmtrain.config.loading import load_config
from llmtrain.config.recipes import copy_recipe, list_recipes, read_recipe
from llmtrain.errors import UserError

Command = Callable[..., subprocess.CompletedProcess[str]]


def test_every_recipe_is_listed_and_copied(tmp_path: Path) -> None:
    assert sorted(list_recipes().values()) == sorted((REPOSITORY / "configs").glob("*.yaml"))
    for name, path in list_recipes().items():
        copy_recipe(name, tmp_path / "new" / f"{name}.yaml")
        assert load_config(tmp_path / "new" / f"{name}.yaml") == load_config(path)
    listed = json.loads(invoke("recipes", "--json", cwd=tmp_path).stdout)
    assert [each["name"] for each in listed] == list(list_recipes())
    assert all(each["summary"].endswith(".") for each in listed)


def test_unknown_recipe_and_existing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean gpt2-small"):
        read_recipe("gpt2-smal")
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    with pytest.raises(UserError, match="already exists"):
        copy_recipe("demo", tmp_path / "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text() == "name: mine\n"


@pytest.mark.slow
def test_wheel_contains_the_recipes(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    ]
    copy = tmp_path / "checkout"
    for name in ("llmtrain", "cli", "configs"):
        shutil.copytree(
            REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(REPOSITORY / name, copy)
    subprocess.run([*build, "--wheel-dir", tmp_path, copy], check=True)
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(tmp_path / "site")
    code = "from llmtrain.config import recipes as r; print(r.__file__, r.list_recipes()['demo'])"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code],  # PYTHONPATH precedes the packages of this environment
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    package = tmp_path / "site" / "llmtrain"
    assert done.stdout.split() == [
        str(package / "config" / "recipes.py"),
        str(package / "configs" / "demo.yaml"),
    ]


def test_config_command(tmp_path: Path) -> None:
    assert invoke("recipes", "gpt2-small", "--to", "mine.yaml", cwd=tmp_path).code == 0
    whole = invoke("config", "mine.yaml", "--set", "optimizer.lr=6e-3", cwd=tmp_path)
    (tmp_path / "whole.yaml").write_text(whole.stdout)
    assert load_config(tmp_path / "whole.yaml") == load_config(
        tmp_path / "mine.yaml", ["optimizer.lr=6e-3"]
    )
    diff = invoke("config", "whole.yaml", "--diff", "mine.yaml", "--json", cwd=tmp_path)
    assert json.loads(diff.stdout) == {"optimizer.lr": {"here": 6e-3, "other": 6e-4}}
    wrong = invoke("config", "mine.yaml", "--set", "optimizer.rl=1", cwd=tmp_path)
    assert wrong.code == 2
    assert "did you mean lr?" in wrong.stderr


def test_shell_completion_and_version(tmp_path: Path, llmtrain: Command) -> None:
    assert llmtrain("--version", cwd=tmp_path).stdout == f"llmtrain {__version__}\n"
    command = [Path(sys.executable).parent / "llmtrain"]
    asked = {"_LLMTRAIN_COMPLETE": "complete_bash", "COMP_WORDS": "llmtrain re", "COMP_CWORD": "1"}
    done = subprocess.run(
        command, env=os.environ | asked, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["report", "recipes"]
