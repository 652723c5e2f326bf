"""The README's blocks marked `sh` and `python` run as they stand, in a copy of what a checkout holds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_blocks_run(tmp_path: Path) -> None:
    for name in ("README.md", "LICENSE", "configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shell, python = blocks("sh"), blocks("python")
    assert shell
    for block in shell:
        subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=environment, check=True)
    for block in python:
        subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "runs" / "texts" / "report" / "loss.png").is_file()


def test_every_file_the_readme_names_is_there() -> None:
    named = set(re.findall(r"\b((?:llmtrain|cli|scripts|configs|tests)/[\w./-]*\w)", README))
    assert "scripts/demo" in named
    missing = [name for name in sorted(named) if not (REPOSITORY / name).exists()]
    assert missing == []


def test_the_file_map_is_complete() -> None:
    modules = {path.name for folder in ("llmtrain", "cli") for path in (REPOSITORY / folder).rglob("*.py")}
    unnamed = {name for name in modules - {"__init__.py", "__main__.py"} if name not in README}
    assert unnamed == set()


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 250


def test_the_differences_that_averaging_makes_are_those_of_the_results() -> None:
    results = (REPOSITORY / "scripts" / "results" / "README.md").read_text()
    said = re.findall(r"[+−]0\.\d{4} ± 0\.\d{4}|\d+ ± \d+ steps", README)
    assert len(said) > 10
    assert [each for each in said if f"| {each.removesuffix(' steps')} |" not in results] == []
