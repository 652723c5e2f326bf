"""Thousands of generated configs, command lines and files: a correct result, or exit code 1 or 2.

Nothing may hang, print a traceback, or leave a partial file under a final name. The examples are
the same in each run. To search for others: FUZZ_SEED=7 pytest tests/robustness/test_fuzz.py
"""

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import DEMO, EVENTS, LINES, command_lines, mutated
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from in_process import Outcome, invoke
from places import REPOSITORY

from llmtrain.checkpoints.safetensors_files import read_header
from llmtrain.config.loading import dump_config, load_config
from llmtrain.data.manifest import Manifest
from llmtrain.data.token_data import open_data
from llmtrain.data.verify import verify_below
from llmtrain.errors import UserError
from llmtrain.evaluation.report.charts import run_charts
from llmtrain.evaluation.report.page import render_page
from llmtrain.evaluation.report.records import read_records, savings
from llmtrain.model.tokenizer import well_formed
from llmtrain.runtime.signals import OUT_OF_TIME
from llmtrain.storage.run_folder import RunFolder

EXAMPLES = {
    "config texts": 250,
    "config trees": 250,
    "command lines": 300,
    "manifests": 200,
    "shards": 200,
    "documents": 250,
    "metrics": 200,
    "results and records": 200,
    "safetensors headers": 200,
}
"""Examples of each kind."""

SECONDS = 60
"""Time limit of a command; most take a hundredth of a second."""

pytestmark = pytest.mark.slow


def fuzz(kind: str) -> Callable[[Any], Any]:
    """Set the number of examples; FUZZ_SEED selects others."""
    found = os.environ.get("FUZZ_SEED")
    chosen = settings(
        max_examples=EXAMPLES[kind],
        derandomize=found is None,
        database=None,
        suppress_health_check=(HealthCheck.function_scoped_fixture, HealthCheck.too_slow),
    )
    return chosen if found is None else lambda test: seed(int(found))(chosen(test))


def test_the_readme_states_the_number_of_examples() -> None:
    readme = (REPOSITORY / "tests" / "README.md").read_text()
    assert f"{sum(EXAMPLES.values()):,} generated" in readme


# --- what a command may do ---------------------------------------------------------------------


def run(*arguments: str | Path, cwd: Path) -> Outcome:
    """Run a command and check the rules for every command."""
    started = time.monotonic()
    outcome = invoke(*arguments, cwd=cwd)
    assert time.monotonic() - started < SECONDS
    assert outcome.code in ((0, 1, 2, OUT_OF_TIME) if "--max-time" in arguments else (0, 1, 2)), (
        outcome
    )
    assert "Traceback" not in outcome.stderr
    assert "this is a bug" not in outcome.stderr, outcome
    if outcome.code:
        assert outcome.stderr.strip() or "damaged" in outcome.stdout, outcome
    return outcome


def reported(folder: Path) -> None:
    """Build the report of a run without drawing it."""
    records = read_records([RunFolder(folder)])
    saved = [row for record in records for row in savings(record)]
    if saved:
        assert run_charts(records)
        render_page(records, saved, []).encode()


def assert_nothing_half_written(place: Path) -> None:
    """Assert that committed folders are complete and no temporary files remain."""
    if any(place.rglob("integrity.json")) or any(place.rglob("manifest.json")):
        assert not [check for check in verify_below(place) if check.problems]
    assert not list(place.rglob(".tmp-*"))


@pytest.fixture
def fresh(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Copy `trained` with hard links; the tests replace files instead of changing them."""
    last: list[Path] = []

    def make() -> Path:
        for old in last:
            shutil.rmtree(old)
        last[:] = [tmp_path_factory.mktemp("place")]
        shutil.copytree(trained, last[0] / "in" / "here", copy_function=os.link)
        return last[0] / "in" / "here"

    return make


# --- configs -----------------------------------------------------------------------------------


def config_or_message(place: Path) -> None:
    """Assert that `load_config` and `pretrain` agree; without data, nothing trains."""
    outcome = run("pretrain", "--config", "fuzzed.yaml", "--set", "data.path=nowhere", cwd=place)
    assert outcome.code == 2, outcome
    try:
        config = load_config(place / "fuzzed.yaml")
    except UserError as error:
        assert str(error) and len(str(error)) < 5000
    else:
        (place / "again.yaml").write_text(dump_config(config))
        assert load_config(place / "again.yaml") == config
    assert not list((place / "runs").glob("*/metrics.jsonl"))


@fuzz("config texts")
@given(data=st.data())
def test_config_texts(tmp_path: Path, data: st.DataObject) -> None:
    """The demo config with inserted, removed and repeated text."""
    text = DEMO
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 40)))
        odd = [
            "[",
            "{",
            "*a",
            "&a ",
            "<<: ",
            "!!int ",
            "- ",
            ": ",
            "\t",
            "\0",
            "'",
            "? ",
            "|\n",
            "%YAML 9\n",
            "---\n",
        ]
        text = (
            text[:start]
            + data.draw(st.sampled_from(odd) | st.text(max_size=5) | st.just(text[start:end] * 2))
            + text[end:]
        )
    (tmp_path / "runs").mkdir(exist_ok=True)
    (tmp_path / "fuzzed.yaml").write_text(text, errors="replace")
    config_or_message(tmp_path)


@fuzz("config trees")
@given(tree=mutated(yaml.safe_load(DEMO)))
def test_config_trees(tmp_path: Path, tree: Any) -> None:
    (tmp_path / "runs").mkdir(exist_ok=True)
    (tmp_path / "fuzzed.yaml").write_text(yaml.safe_dump(tree))
    config_or_message(tmp_path)


# --- command lines -----------------------------------------------------------------------------


@fuzz("command lines")
@given(words=command_lines())
def test_command_lines(fresh: Callable[[], Path], words: list[str]) -> None:
    place = fresh()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "RAY_ADDRESS", "127.0.0.1:9"
        )  # no server there: starting a cluster per example would take minutes
        outcome = run(*words, cwd=place)
    if outcome.code == 0 and "--json" in words and "--help" not in words:
        json.loads(outcome.stdout)
    assert_nothing_half_written(place.parents[1])


# --- data --------------------------------------------------------------------------------------


def read_data(folder: Path) -> str:
    """Read every token of a data folder and return its hash."""
    data = open_data(folder)
    for split in ("train", "val"):
        reader = data.reader(split)
        assert int(reader.read(0, len(reader)).max(initial=0)) < data.vocab_size
    return data.sha256


@fuzz("manifests")
@given(data=st.data())
def test_manifests(fresh: Callable[[], Path], data: st.DataObject) -> None:
    """Half of the mutated manifests get a matching hash; valid ones match the shards."""
    folder = fresh() / "data"
    intact = json.loads((folder / "manifest.json").read_text())
    document = data.draw(mutated(intact))
    if data.draw(st.booleans()):
        document.pop("sha256", None)
        try:
            document["sha256"] = Manifest.model_validate_json(json.dumps(document)).sha256
        except ValueError:
            document["sha256"] = "0" * 64
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps(document))
    try:
        read_data(folder)
    except UserError:
        assert run("verify", "data", cwd=folder.parent).code == 1
        assert run("eval", "runs/run", cwd=folder.parent).code == 2
    else:
        kept = ("format", "tokenizer")
        assert [document[key] for key in kept] == [intact[key] for key in kept]
        assert document["train"]["tokens"] == intact["train"]["tokens"]


@fuzz("shards")
@given(data=st.data())
def test_shards(fresh: Callable[[], Path], data: st.DataObject) -> None:
    path = fresh() / "data" / "val-00000.bin"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = 4 * data.draw(st.integers(0, 4) | st.integers(0, len(content) // 4 - 1))
        content[position : position + 4] = struct.pack(
            "<i", data.draw(st.integers(-(2**31), 2**31 - 1))
        )
    content = content[
        : data.draw(st.sampled_from([len(content)] * 3 + [0, 3, 1023, 1024, len(content) - 1]))
    ]
    content += data.draw(st.sampled_from([b"", b"", b"", b"\0", b"\0\0"]))
    unchanged = bytes(content) == path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    assert run("verify", "data", cwd=path.parents[1]).code == (0 if unchanged else 1)
    try:
        read_data(path.parent)
    except UserError as error:
        assert "val-00000.bin" in str(error)


def tokens_by_hand(content: bytes) -> int | None:
    """Count the tokens of JSON lines; None if a line is invalid."""
    total = 0
    for number, line in enumerate(content.split(b"\n")):
        document = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
        if document.strip():
            try:
                total += len(well_formed(json.loads(document.decode())["text"]).encode()) + 1
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                return None
    return total


@fuzz("documents")
@given(
    lines=st.lists(st.just(b'{"text": "good"}') | LINES, min_size=1, max_size=8),
    torn=st.integers(0, 4),
)
def test_documents(tmp_path: Path, lines: list[bytes], torn: int) -> None:
    content = b"\n".join(lines)
    content = content[: len(content) - torn]
    (tmp_path / "d.jsonl").write_bytes(content)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    words = (
        "prepare",
        "d.jsonl",
        "--out",
        "out",
        "--tokenizer",
        "byte",
        "--val-fraction",
        "0",
        "--json",
    )
    outcome = run(*words, cwd=tmp_path)
    expected = tokens_by_hand(content)
    if outcome.code == 0:
        assert json.loads(outcome.stdout)["train"]["tokens"] == expected
        assert run("verify", "out", cwd=tmp_path).code == 0
    else:
        assert {path.name for path in tmp_path.iterdir()} == {"d.jsonl"}
        assert "d.jsonl" in outcome.stderr or not expected or b'"good"' not in content


# --- a run's files -----------------------------------------------------------------------------


@fuzz("metrics")
@given(lines=st.lists(EVENTS | LINES, max_size=6), number=st.integers(0, 19))
def test_metrics(fresh: Callable[[], Path], lines: list[bytes], number: int) -> None:
    place = fresh()
    path = place / "runs" / "run" / "metrics.jsonl"
    intact = path.read_bytes()
    path.unlink()
    path.write_bytes(b"\n".join([*lines, intact]))
    try:
        reported(path.parent)
    except UserError as error:
        assert "metrics.jsonl, line" in str(error)
        return
    if number == 0:  # drawing takes a second
        assert run("report", "runs/run", cwd=place).code == 0


FILES = [
    "evals/*.json",
    "snapshots/step-00000008/*.json",
    "averages/running-mean/step-00000008/*.json",
    "state/step-00000008/*.json",
]
AFTER = [
    ["runs"],
    ["eval", "runs/run", "--tokens", "40"],
    ["average", "runs/run", "--every", "2", "--window", "2", "--out", "out"],
    ["average", "runs/run", "--method", "dense", "--from", "4", "--at", "8"],
    ["inspect", "runs/run/averages/running-mean"],
    ["verify", "runs/run"],
]


@fuzz("results and records")
@given(data=st.data(), words=st.sampled_from(AFTER))
def test_results_and_records(
    fresh: Callable[[], Path], data: st.DataObject, words: list[str]
) -> None:
    place = fresh()
    found = sorted((place / "runs" / "run").glob(data.draw(st.sampled_from(FILES))))
    path = data.draw(st.sampled_from(found))
    changed = json.dumps(data.draw(mutated(json.loads(path.read_text()))))
    path.unlink()
    path.write_text(changed)
    run(*words, cwd=place)
    with suppress(UserError):
        reported(place / "runs" / "run")


@fuzz("safetensors headers")
@given(data=st.data())
def test_safetensors_headers(tmp_path: Path, data: st.DataObject) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "I64", "shape": [], "data_offsets": [16, 24]},
    }
    text = json.dumps(data.draw(mutated(header))).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        struct.pack("<Q", len(text) + data.draw(st.sampled_from([0, 0, 0, 1, -1])))
        + text
        + bytes(24)
    )
    try:
        tensors, _ = read_header(path)
    except UserError as error:
        assert "model.safetensors" in str(error)
    else:
        assert sum(tensor.bytes for tensor in tensors.values()) == 24
    outcome = run("inspect", path, cwd=tmp_path)
    assert outcome.code in (0, 2)
