"""Included recipes, and the commands `recipes` and `config`."""

import json
import os
import shlex
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
from llmtrain.config.recipes import copy_recipe, find_recipe, list_recipes
from llmtrain.errors import UserError

Command = Callable[..., subprocess.CompletedProcess[str]]


def test_every_recipe_is_listed_and_copied(tmp_path: Path) -> None:
    assert {each.path.name for each in list_recipes()} == {
        path.name for path in (REPOSITORY / "configs").glob("*.yaml")
    }
    for each in list_recipes():
        assert each.summary.endswith(".")
        copy_recipe(each.name, tmp_path / "new" / f"{each.name}.yaml")
        copied = load_config(tmp_path / "new" / f"{each.name}.yaml")
        assert copied == load_config(each.path)


def test_unknown_recipe_and_existing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean gpt2-small"):
        find_recipe("gpt2-smal")
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    with pytest.raises(UserError, match="already exists"):
        copy_recipe("demo", tmp_path / "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text() == "name: mine\n"


def test_missing_config_with_a_recipe_name_suggests_a_copy(tmp_path: Path) -> None:
    for given, copied in [
        ("configs/gpt2-small.yaml", "configs/gpt2-small.yaml"),
        ("a b/demo", "a b/demo.yaml"),
    ]:
        with pytest.raises(UserError) as caught:
            load_config(tmp_path / given)
        assert caught.value.hint is not None
        words = shlex.split(caught.value.hint.partition(": ")[2])
        assert words == ["llmtrain", "recipes", Path(copied).stem, "--to", str(tmp_path / copied)]


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
    code = "from llmtrain.config import recipes as r; print(r.__file__, r.find_recipe('demo').path)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],  # without the packages of this environment
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
