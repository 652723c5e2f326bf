"""The README's blocks marked `sh` and `python` run as they stand, in a copy of what a checkout holds."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
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
        subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=environment, check=True
        )
    for block in python:
        subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "runs" / "texts" / "report" / "loss.png").is_file()


def test_every_file_the_readme_names_is_there() -> None:
    named = set(re.findall(r"\b((?:llmtrain|cli|scripts|configs|tests)/[\w./-]*\w)", README))
    assert "scripts/demo" in named
    missing = [name for name in sorted(named) if not (REPOSITORY / name).exists()]
    assert missing == []


def test_the_file_map_is_complete() -> None:
    modules = {
        path.name for folder in ("llmtrain", "cli") for path in (REPOSITORY / folder).rglob("*.py")
    }
    unnamed = {name for name in modules - {"__init__.py", "__main__.py"} if name not in README}
    assert unnamed == set()


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 250


def test_the_differences_that_averaging_makes_are_those_of_the_results() -> None:
    results = (REPOSITORY / "scripts" / "results" / "README.md").read_text()
    said = re.findall(r"[+−]0\.\d{4} ± 0\.\d{4}|\d+ ± \d+ steps", README)
    assert len(said) > 10
    assert [each for each in said if f"| {each.removesuffix(' steps')} |" not in results] == []


TRAINING, SMALL = "train 6x384, block 256, batch 8", "train gpt2-small, block 1024, batch 1"
AVERAGE, PREPARE = "5 checkpoints of 124M", "prepare webmix-train, 43,497 documents"
TOLD = {
    "README.md": [
        (r"trains (\S+) times as fast as eager float32", "train", TRAINING, "tokens/s", "ratio"),
        (
            r"float32, nanoGPT's way on a CPU, in (\S+) of its memory",
            "train",
            TRAINING,
            "GB",
            "ratio",
        ),
        (r"at (\S+) of the rate of bfloat16 products", "train", TRAINING, "share", "median"),
        (r"GPT-2 small (\S+) times", "train", SMALL, "tokens/s", "ratio"),
        (r"GPT-2 small \S+ times, in (\S+)\.", "train", SMALL, "GB", "ratio"),
        (
            r"evaluates (\S+) times as fast as it trains",
            "eval",
            "eval 6x384, block 256",
            "tokens/s",
            "ratio",
        ),
        (r"five 124M checkpoints: (\S+) s", "average", AVERAGE, "s", "median"),
        (r"`prepare`: (\S+) of nanoGPT's time", "prepare", PREPARE, "s", "ratio"),
    ],
    "scripts/results/bench/README.md": [
        (r"against eager float32 \| ≥ 2.6 × \| (\S+) ×", "train", TRAINING, "tokens/s", "ratio"),
        (r"≥ 0.75 \| \**([\d.]+)", "train", TRAINING, "share", "median"),
        (r"≤ 0.45 × \| \**([\d.]+)", "train", TRAINING, "GB", "ratio"),
        (r"≥ 2.5 × \| (\S+) ×", "train", SMALL, "tokens/s", "ratio"),
        (r"≥ 2.5 × \| \S+ × in (\S+) of", "train", SMALL, "GB", "ratio"),
        (r"≤ 6 s, ≤ 1 GB, flat \| \**([\d.]+)", "prepare", PREPARE, "s", "median"),
        (r"≤ 1.2 s, ≤ 300 MB \| \**([\d.]+)", "average", AVERAGE, "s", "median"),
        (r"≤ 1.2 s, ≤ 300 MB \| \S+ s\**, (\S+) MB", "average", AVERAGE, "MB", "median"),
        (r"≥ 2.8 × \| (\S+) ×", "eval", "eval 6x384, block 256", "tokens/s", "ratio"),
        (r"≤ 0.20 \| (\S+) \|", "snapshot", "wait for a snapshot of 124M", "s", "ratio"),
    ],
}


@pytest.mark.parametrize("page", TOLD)
def test_the_speeds_that_are_told_are_those_that_were_measured(page: str) -> None:
    """Where a figure is told with fewer digits, it is the measured one rounded to them."""
    text = (REPOSITORY / page).read_text()
    for pattern, file, what, figure, kind in TOLD[page]:
        told = re.findall(pattern, " ".join(text.split()))
        assert len(told) == 1, pattern
        rows = json.loads((REPOSITORY / f"scripts/results/bench/{file}.json").read_text())["rows"]
        side = "eval" if file == "eval" else "llmtrain"
        (row,) = (
            row for row in rows if (row["what"], row["side"], row["figure"]) == (what, side, figure)
        )
        assert [f"{row[kind]:.{len(told[0].partition('.')[2])}f}"] == told, pattern
