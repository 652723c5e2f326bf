"""Integers of 5,000 digits, which Python refuses to convert, in options and files."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import refused
from places import REPOSITORY

HUGE = "9" * 5000
EARLIER = REPOSITORY / "tests" / "files" / "earlier_run"
LIMIT = "an integer has more than 4,300 digits"


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EARLIER, tmp_path / "work"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("config", "runs/old/config.yaml", "--set", f"seed={HUGE}"), LIMIT),
        (
            ("eval", "runs/old", "--tasks", "piqa", "--batch-size", HUGE),
            "is neither auto nor a number",
        ),
        (("average", "runs/old", "--every", "5", "--at", HUGE), "is not last, all or a step"),
    ],
)
def test_options(workplace: Path, arguments: tuple[str, ...], expected: str) -> None:
    refused(*arguments, cwd=workplace, expected=expected)


def manifest(work: Path) -> None:
    path = work / "data/texts/manifest.json"
    path.write_text(path.read_text().replace('"format": 1', f'"format": {HUGE}'))


def metrics(work: Path) -> None:
    path = work / "runs/old/metrics.jsonl"
    path.write_text(f'{{"step": {HUGE}}}\n')


def result(work: Path) -> None:
    for path in (work / "runs/old/evals").glob("*.json"):
        path.write_text(f'{{"loss": {HUGE}}}')


def config(work: Path) -> None:
    path = work / "runs/old/config.yaml"
    path.write_text(path.read_text() + f"seed2: {HUGE}\n")


@pytest.mark.parametrize("damage", [manifest, metrics, result, config])
def test_files(workplace: Path, damage: Callable[[Path], None]) -> None:
    damage(workplace)
    command = "eval" if damage is manifest else "report"
    refused(command, "runs/old", cwd=workplace, expected=LIMIT)
