"""The documents: their blocks run, their links resolve, their figures are measured.

Blocks marked `sh` and `python` run as they stand, in a folder that looks like a checkout. Blocks
marked `console` need a GPU, the network or much time, and are not run.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import REPOSITORY

README = REPOSITORY / "README.md"
GUIDES = sorted(
    path
    for pattern in ("*.md", "configs/*.md", "llmtrain/**/*.md", "scripts/**/*.md", "tests/*.md")
    for path in REPOSITORY.glob(pattern)
    if path != README
)
DOCUMENTS = [README, *GUIDES]
GENERATED = REPOSITORY / "scripts" / "results" / "README.md"


def name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def blocks(path: Path, language: str) -> list[str]:
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, path.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_blocks_run(tmp_path: Path) -> None:
    for each in ("README.md", "LICENSE", "configs", "scripts", "tests"):
        (tmp_path / each).symlink_to(REPOSITORY / each)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    assert blocks(README, "sh") and blocks(README, "python")
    for document in DOCUMENTS:
        for command, language in (
            (["bash", "-euo", "pipefail", "-c"], "sh"),
            ([sys.executable, "-c"], "python"),
        ):
            for block in blocks(document, language):
                done = subprocess.run(
                    [*command, block],
                    cwd=tmp_path,
                    env=environment,
                    check=False,
                    capture_output=True,
                    text=True,
                )
                assert done.returncode == 0, f"{name(document)}:\n{block}\n{done.stderr}"
    assert list((tmp_path / "runs" / "tiny").rglob("report.html"))


def anchors(path: Path) -> set[str]:
    """GitHub's anchors of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)", path.read_text(), re.MULTILINE):
        link = next(filter(None, target))
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), f"{name(path)}: {link}"
        assert not anchor or anchor in anchors(place), f"{name(path)}: {link}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_named_files_exist(path: Path) -> None:
    text = re.sub(r"\]\([^)]*\)", "", path.read_text())
    named = set(re.findall(r"(?<![\w/.])((?:llmtrain|scripts|configs|tests)/[\w./-]*\w)", text))
    assert [each for each in sorted(named) if not (REPOSITORY / each).exists()] == []


@pytest.mark.slow
def test_named_tests_exist() -> None:
    """Each `pytest PATH -k WORD` in a document selects at least one test."""
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.splitlines()
    named = [
        (name(document), *found)
        for document in DOCUMENTS
        for found in re.findall(r"pytest ((?:tests/[\w./]+ ?)+)(?:-k (\w+))?", document.read_text())
    ]
    assert named
    for document, paths, word in named:
        for path in paths.split():
            selected = [each for each in listed if each.startswith(path) and word in each]
            assert selected, f"{document}: pytest {path} -k {word}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_lines_have_at_most_100_columns(path: Path) -> None:
    if path == GENERATED:
        return
    wide = [
        line
        for line in path.read_text().splitlines()
        if len(line) > 100 and (path == README or not line.startswith(("|", "[", "!")))
    ]
    assert wide == []


def test_no_placeholder_is_left() -> None:
    assert [name(path) for path in DOCUMENTS if "@@" in path.read_text()] == []


def test_the_notice_names_a_shipped_file() -> None:
    (shipped,) = re.findall(r"^llmtrain/\S+$", (REPOSITORY / "NOTICE").read_text(), re.MULTILINE)
    assert (REPOSITORY / shipped).is_file()


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_the_gains_in_the_readme_are_the_measured_ones() -> None:
    shown = re.findall(r"[+−]0\.\d{4} ± 0\.\d{4}", README.read_text())
    assert len(shown) > 5
    assert [each for each in shown if f"| {each} |" not in GENERATED.read_text()] == []


TRAINING, SMALL = "train 6x384, block 256, batch 8", "train gpt2-small, block 1024, batch 1"
EVALUATION = "eval 6x384, block 256"
AVERAGE, PREPARE = "5 checkpoints of 124M", "prepare webmix-train, 43,497 documents"
BENCH = "scripts/results/bench/README.md"
FIGURES = [
    ("README.md", r"training is (\S+) times as fast as eager", TRAINING, "tokens/s", "ratio"),
    ("README.md", r"default on a CPU, with (\S+) times its memory", TRAINING, "GB", "ratio"),
    ("README.md", r"five 124M checkpoints takes (\S+) s", AVERAGE, "s", "median"),
    ("README.md", r"`prepare` takes (\S+) times as long", PREPARE, "s", "ratio"),
    (BENCH, r"vs eager float32 \| ≥ 2.6 × \| (\S+) ×", TRAINING, "tokens/s", "ratio"),
    (BENCH, r"≥ 0.75 \| \**([\d.]+)", TRAINING, "share", "median"),
    (BENCH, r"≤ 0.45 × \| \**([\d.]+)", TRAINING, "GB", "ratio"),
    (BENCH, r"≥ 2.5 × \| (\S+) ×", SMALL, "tokens/s", "ratio"),
    (BENCH, r"≥ 2.5 × \| \S+ × in (\S+) of", SMALL, "GB", "ratio"),
    (BENCH, r"≤ 6 s, ≤ 1 GB, flat \| \**([\d.]+)", PREPARE, "s", "median"),
    (BENCH, r"≤ 300 MB \| \**([\d.]+) ×", AVERAGE, "s", "ratio"),
    (BENCH, r"≤ 300 MB \| \S+ × \((\S+) s\)", AVERAGE, "s", "median"),
    (BENCH, r"≤ 300 MB \| \S+ × \(\S+ s\), (\S+) MB", AVERAGE, "MB", "median"),
    (BENCH, r"≥ 2.8 × \| (\S+) ×", EVALUATION, "tokens/s", "ratio"),
    (BENCH, r"≤ 0.20 \| (\S+) \|", "wait for a snapshot of 124M", "s", "ratio"),
]


def measured(what: str, figure: str, kind: str) -> float:
    """The figure of our side in the benchmark's JSON file."""
    file = "snapshot" if "snapshot" in what else "average" if what == AVERAGE else what.split()[0]
    path = REPOSITORY / "scripts" / "results" / "bench" / f"{file}.json"
    side = "eval" if file == "eval" else "llmtrain"
    wanted = (what, side, figure)
    (row,) = (
        row
        for row in json.loads(path.read_text())["rows"]
        if (row["what"], row["side"], row["figure"]) == wanted
    )
    return float(row[kind])


@pytest.mark.parametrize(("page", "pattern", "what", "figure", "kind"), FIGURES)
def test_the_speeds_in_the_documents_are_the_measured_ones(
    page: str, pattern: str, what: str, figure: str, kind: str
) -> None:
    """A figure shown with fewer digits is the measured one rounded to them."""
    text = " ".join((REPOSITORY / page).read_text().split())
    (shown,) = re.findall(pattern, text)
    digits = len(shown.partition(".")[2])
    assert f"{measured(what, figure, kind):.{digits}f}" == shown
