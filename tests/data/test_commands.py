"""The commands `llmtrain prepare` and `llmtrain verify`."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from in_process import invoke, refused

from llmtrain.cli.prepare import parse_count


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "web.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"Document {i}. " * 20}) + "\n" for i in range(200))
    )
    return path


def test_prepare_and_verify(source: Path, tmp_path: Path) -> None:
    result = invoke(
        "prepare", "web.jsonl", "--tokenizer", "byte", "--val-fraction", "0.1", cwd=tmp_path
    )
    assert result.code == 0, result.stderr
    assert "180" in result.stdout and "byte tokens in data/web" in result.stdout
    assert "reading web.jsonl: 1 file(s)" in result.stderr
    assert "Generating" not in result.stderr

    again = invoke(
        *("prepare", "web.jsonl", "--tokenizer", "byte", "--val-fraction", "0.1", "--json"),
        cwd=tmp_path,
    )
    assert "nothing to do" in again.stderr
    assert json.loads(again.stdout) == json.loads((tmp_path / "data/web/manifest.json").read_text())

    verified = invoke("verify", "data", cwd=tmp_path)
    assert verified.code == 0
    assert "1 folder(s)" in verified.stdout and "all match their records" in verified.stdout

    shard = tmp_path / "data/web/train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    damaged = invoke("verify", "data/web", cwd=tmp_path)
    assert damaged.code == 1
    assert "train-00000.bin does not have the recorded BLAKE3" in damaged.stdout
    assert "error: 1 of 1 folder(s) differ" in damaged.stderr and "hint: " in damaged.stderr
    listed = json.loads(invoke("verify", "--json", "data/web", cwd=tmp_path).stdout)
    assert listed[0]["folder"] == "data/web" and len(listed[0]["problems"]) == 1


def test_an_empty_val_split_is_reported(source: Path, tmp_path: Path) -> None:
    result = invoke(
        "prepare", "web.jsonl", "--val-fraction", "0", "--shard-tokens", "1k", cwd=tmp_path
    )
    assert "The val split is empty" in result.stdout
    assert len(list((tmp_path / "data/web").glob("train-*.bin"))) > 5


@pytest.mark.parametrize(
    "arguments",
    [
        ("absent.txt",),
        ("web.jsonl", "--val-fraction", "1"),
        ("web.jsonl", "--shard-tokens", "many"),
        ("web.jsonl", "--tokenizer", "llama"),
        ("openwebtext",),
        ("hub:",),
    ],
)
def test_invalid_arguments_exit_with_2(
    source: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    result = invoke("prepare", *arguments, cwd=tmp_path)
    assert result.code == 2
    assert "rror" in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not list(tmp_path.glob("data/*"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_first_shard_leaves_nothing(
    tmp_path: Path, number: int, code: int
) -> None:
    (tmp_path / "big.txt").write_text("It was the best of times. " * 1_500_000)
    # A shell without job control lets background processes ignore SIGINT.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "from llmtrain.cli.main import main; main()"
    command = [sys.executable, "-c", program, "prepare", "big.txt", "--val-fraction", "0"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("data/.tmp-big/shards/.tmp-train*")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert "data/big is incomplete; the same command resumes" in errors
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("100M", 100_000_000),
        ("1_000", 1000),
        ("2.5e6", 2_500_000),
        ("10k", 10_000),
        ("1.5b", 1_500_000_000),
        ("7", 7),
    ],
)
def test_counts_are_parsed(text: str, number: int) -> None:
    assert parse_count(text) == number


@pytest.mark.parametrize("text", ["", "M", "x", "1.5", "1e999", "nan", "1.0001k"])
def test_invalid_counts_are_rejected(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_count(text)


def test_help_does_not_import_heavy_packages() -> None:
    code = (
        "import sys; from llmtrain.cli import prepare, verify; "
        "heavy = {'torch', 'numpy', 'datasets', 'fsspec', 'tiktoken', 'pyarrow', 'pydantic'}; "
        "print(heavy & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"


def test_a_small_val_split_is_reported(source: Path, tmp_path: Path) -> None:
    command = ("prepare", "web.jsonl", "--tokenizer", "byte", "--out")
    one = invoke(*command, "one", "--val-fraction", "0.0005", cwd=tmp_path)
    warning = "warning: one, val split: 1 document(s) are too few for a reliable loss"
    assert warning in one.stderr and one.stderr.count("warning") == 1
    ten = invoke(*command, "ten", "--val-fraction", "0.05", cwd=tmp_path)
    assert "warning" not in ten.stderr


def test_memory_as_output_is_refused(source: Path, tmp_path: Path) -> None:
    for url in ("memory://bucket/out", "simplecache::memory://bucket/out"):
        refused("prepare", source, "--out", url, cwd=tmp_path, expected="the data would be lost")


def test_too_many_threads_are_refused(source: Path, tmp_path: Path) -> None:
    expected = "--workers 100000 is not between 1 and 1,024"
    refused("prepare", source, "--workers", "100000", cwd=tmp_path, expected=expected)
