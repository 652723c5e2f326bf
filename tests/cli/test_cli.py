"""The installed command from end to end, as a user meets it: output, exit codes, errors, signals."""

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from llmtrain.config.schema import RunConfig
from llmtrain.storage.run_folder import step_folders

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def workplace(tmp_path: Path, tiny: Callable[..., RunConfig], text_file: Path) -> Path:
    """An empty folder with a text file and a configuration beside it."""
    (tmp_path / "documents.jsonl").write_text(text_file.read_text())
    values = tiny(data__path="data/documents").model_dump(mode="json")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def test_the_four_commands_work_as_they_stand(workplace: Path, llmtrain: Command) -> None:
    prepared = llmtrain(
        "prepare",
        "documents.jsonl",
        "--tokenizer",
        "byte",
        "--val-fraction",
        "0.1",
        "--json",
        cwd=workplace,
    )
    assert prepared.returncode == 0, prepared.stderr
    manifest = json.loads(prepared.stdout)
    assert manifest["tokenizer"]["name"] == "byte"

    trained = llmtrain("pretrain", "--config", "tiny.yaml", cwd=workplace)
    assert trained.returncode == 0, trained.stderr
    assert "validation" in trained.stdout
    assert "Traceback" not in trained.stderr

    averaged = llmtrain("average", "--every", "2", "--window", "3", "--json", cwd=workplace)
    assert averaged.returncode == 0, averaged.stderr
    (average,) = json.loads(averaged.stdout)
    assert (average["label"], average["step"], average["inputs"]) == ("lawa-3x2", 12, [8, 10, 12])
    assert sum(average["weights"]) == pytest.approx(1.0)
    assert (workplace / average["path"] / "provenance.json").is_file()

    evaluated = llmtrain("eval", "--json", cwd=workplace)
    assert evaluated.returncode == 0, evaluated.stderr
    rows = json.loads(evaluated.stdout)
    assert {row["label"] for row in rows} == {"raw", "ema-0.9", "lawa-3x2"}
    for row in rows:
        assert {
            "label",
            "step",
            "path",
            "loss",
            "perplexity",
            "bits_per_byte",
            "tokens",
            "delta",
        } <= set(row)
    raw = {row["step"]: row["loss"] for row in rows if row["label"] == "raw"}
    assert all(row["delta"] == pytest.approx(row["loss"] - raw[row["step"]]) for row in rows)

    reported = llmtrain("report", "--json", cwd=workplace)
    document = json.loads(reported.stdout)
    assert all(Path(workplace, document[key]).is_file() for key in ("plot", "page"))
    assert {row["label"] for row in document["best"]} == {"raw", "ema-0.9", "lawa-3x2"}
    assert document["interventions"]["skipped"] == 0
    twice = llmtrain("report", workplace / "runs/tiny", "runs/tiny", "--json", cwd=workplace)
    assert json.loads(twice.stdout) == document
    assert "lawa-3x2" in llmtrain("eval", cwd=workplace).stdout

    verified = llmtrain("verify", "data/documents", "runs/tiny", cwd=workplace)
    assert verified.returncode == 0, verified.stderr
    (workplace / average["path"] / "model.safetensors").write_bytes(b"damaged")
    damaged = llmtrain("verify", "runs/tiny", cwd=workplace)
    assert damaged.returncode == 1
    assert "model.safetensors" in damaged.stdout
    assert "1 of" in damaged.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["eval"], 2, "there is no run under runs/"),
        (["average", "--every", "2"], 2, "there is no run under runs/"),
        (["report", "nowhere"], 2, "not a run"),
        (["eval", "nowhere"], 2, "nowhere does not exist"),
        (["pretrain", "--config", "none.yaml"], 2, "cannot read the config none.yaml"),
        (["pretrain", "--config", "tiny.yaml"], 2, "data/documents"),
        (
            ["pretrain", "--config", "tiny.yaml", "--branch", "1", "--from", "3"],
            2,
            "data/documents",
        ),
        (["pretrain", "--config", "tiny.yaml", "--set", "train.device=gpu"], 2, "is no device"),
        (
            ["pretrain", "--config", "tiny.yaml", "--set", "train.device=cuda:9"],
            2,
            "this machine has",
        ),
        (["pretrain", "--config", "tiny.yaml", "--set", "optimizer.LR=3"], 2, "did you mean lr?"),
        (["verify", "nowhere"], 2, "nowhere"),
        (["prepare", "nothing.jsonl"], 2, "nothing.jsonl"),
    ],
)
def test_errors_are_one_message_and_a_hint(
    workplace: Path, llmtrain: Command, arguments: list[str], code: int, expected: str
) -> None:
    result = llmtrain(*arguments, cwd=workplace)
    assert result.returncode == code
    assert expected in result.stderr
    assert "hint:" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (workplace / "runs").exists()


def test_links_in_a_circle_are_an_error_of_the_path(workplace: Path, llmtrain: Command) -> None:
    (workplace / "here").symlink_to("there")
    (workplace / "there").symlink_to("here")
    for command in (["report", "here"], ["prepare", "documents.jsonl", "--out", "here/data"]):
        result = llmtrain(*command, cwd=workplace)
        assert result.returncode in (1, 2)  # from Python 3.13 on, `report` finds no run there
        assert "error:" in result.stderr
        assert "this is a bug" not in result.stderr


def test_debug_shows_the_traceback(workplace: Path, llmtrain: Command) -> None:
    result = llmtrain("--debug", "report", "nowhere", cwd=workplace)
    assert "Traceback" in result.stderr


def test_a_wrong_command_line_exits_with_2(workplace: Path, llmtrain: Command) -> None:
    assert llmtrain("pretrain", cwd=workplace).returncode == 2
    assert llmtrain("pretrian", cwd=workplace).returncode == 2


def test_module_and_version(workplace: Path, llmtrain: Command) -> None:
    version = llmtrain("--version", cwd=workplace).stdout
    module = subprocess.run(
        [sys.executable, "-m", "llmtrain", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=workplace,
    )
    assert module.stdout == version
    assert version.startswith("llmtrain ")


@pytest.mark.parametrize(
    "command", ["prepare", "pretrain", "average", "eval", "report", "runs", "verify"]
)
def test_help_names_every_option_and_imports_nothing_heavy(
    workplace: Path, llmtrain: Command, command: str
) -> None:
    result = llmtrain(command, "--help", cwd=workplace)
    assert result.returncode == 0
    assert "Usage:" in result.stdout
    code = (
        "import sys; from llmtrain.cli.main import app\n"
        "heavy = {'torch', 'datasets', 'numpy', 'wandb', 'matplotlib', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]
)
def test_a_signal_saves_the_state_and_the_same_command_goes_on(
    workplace: Path, llmtrain: Command, number: int, code: int
) -> None:
    llmtrain(
        "prepare", "documents.jsonl", "--tokenizer", "byte", "--val-fraction", "0.1", cwd=workplace
    )
    # Where the tests run in the background of a shell, the signal would be ignored.
    program = (
        f"import signal; signal.signal({int(number)}, signal.SIG_DFL if {int(number)} != signal.SIGINT "
        "else signal.default_int_handler); from llmtrain.cli.main import main; main()"
    )
    command = [sys.executable, "-c", program, "pretrain", "--config", "tiny.yaml"]
    long = ["--set", "train.max_steps=100000", "--set", "checkpoint.state_every=100000"]
    process = subprocess.Popen(
        [*command, *long],
        cwd=workplace,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while (
        not step_folders(workplace / "runs" / "tiny" / "snapshots") and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert "training checkpoint saved" in errors
    (step,) = step_folders(workplace / "runs" / "tiny" / "state")
    again = llmtrain(
        "pretrain", "--config", "tiny.yaml", "--set", f"train.max_steps={step + 5}", cwd=workplace
    )
    assert again.returncode == 0, again.stderr
    assert f"resumed at step {step:,}" in again.stdout
    finished = llmtrain(
        "pretrain", "--config", "tiny.yaml", "--set", f"train.max_steps={step + 5}", cwd=workplace
    )
    assert "has finished" in finished.stdout


@pytest.mark.parametrize(
    "command", ["recipes", "recipes --json", "plan --config configs/demo.yaml"]
)
def test_results_that_nobody_reads_end_with_the_code_of_a_closed_pipe(command: str) -> None:
    script = f"{Path(sys.executable).parent}/llmtrain {command} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("pipe", ["|", "2>&1 |"])
def test_a_closed_pipe_saves_the_state(workplace: Path, llmtrain: Command, pipe: str) -> None:
    llmtrain(
        "prepare", "documents.jsonl", "--tokenizer", "byte", "--val-fraction", "0.1", cwd=workplace
    )
    command = (
        f"'{Path(sys.executable).parent}/llmtrain' pretrain --config tiny.yaml --set train.max_steps=100000 "
        f"--set log.every=1 --set checkpoint.state_every=100000 {pipe} head -90 > /dev/null; "
        "exit ${PIPESTATUS[0]}"
    )
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=workplace,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 141
    assert "Traceback" not in result.stderr
    assert len(step_folders(workplace / "runs" / "tiny" / "state")) == 1


def test_the_next_command_can_be_pasted(workplace: Path, llmtrain: Command) -> None:
    llmtrain(
        "prepare", "documents.jsonl", "--tokenizer", "byte", "--val-fraction", "0.1", cwd=workplace
    )
    copied = llmtrain("recipes", "demo", "--to", "my demo.yaml", cwd=workplace)
    trained = llmtrain("pretrain", "--config", "tiny.yaml", "--run-dir", "my run", cwd=workplace)
    following = [shlex.split(result.stdout.rpartition("Next: ")[2]) for result in (copied, trained)]
    assert following[0] == ["llmtrain", "pretrain", "--config", "my demo.yaml"]
    assert following[1] == ["llmtrain", "average", "my run", "--every", "N"]


def test_other_files_are_never_touched(workplace: Path, llmtrain: Command) -> None:
    llmtrain(
        "prepare", "documents.jsonl", "--tokenizer", "byte", "--val-fraction", "0.1", cwd=workplace
    )
    (workplace / "mine" / ".tmp-work").mkdir(parents=True)
    for folder, expected in (("mine", "contains other files"), ("tiny.yaml", "is a file")):
        result = llmtrain("pretrain", "--config", "tiny.yaml", "--run-dir", folder, cwd=workplace)
        assert result.returncode == 2
        assert expected in result.stderr
    assert (workplace / "mine" / ".tmp-work").is_dir()
