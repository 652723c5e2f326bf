"""The installed command from end to end: output, exit codes, errors, signals."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from in_process import invoke
from places import REPOSITORY

from llmtrain.config.schema import RunConfig
from llmtrain.storage.run_folder import step_folders

Command = Callable[..., subprocess.CompletedProcess[str]]

BIN = Path(sys.executable).parent
PRETRAIN = ("pretrain", "--config", "tiny.yaml")
ENDLESS = ("--set", "train.max_steps=100000", "--set", "checkpoint.state_every=100000")


@pytest.fixture
def workplace(tmp_path: Path, tiny: Callable[..., RunConfig], text_file: Path) -> Path:
    """A folder with a text file and a configuration, but without prepared data."""
    shutil.copy(text_file, tmp_path / "documents.jsonl")
    values = tiny(data__path="data/documents").model_dump(mode="json")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


@pytest.fixture
def prepared(workplace: Path, data_folder: Path) -> Path:
    """The same folder with prepared data."""
    shutil.copytree(data_folder, workplace / "data" / "documents")
    return workplace


@pytest.mark.slow
def test_the_commands_of_the_readme_work_in_sequence(workplace: Path, llmtrain: Command) -> None:
    options = ("--tokenizer", "byte", "--val-fraction", "0.1", "--json")
    prepared = llmtrain("prepare", "documents.jsonl", *options, cwd=workplace)
    assert prepared.returncode == 0, prepared.stderr
    assert json.loads(prepared.stdout)["tokenizer"]["name"] == "byte"

    trained = llmtrain(*PRETRAIN, cwd=workplace)
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
    keys = {"label", "step", "path", "loss", "perplexity", "bits_per_byte", "tokens", "delta"}
    assert all(keys <= set(row) for row in rows)
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
    ("arguments", "expected"),
    [
        (["eval"], "no run in runs/"),
        (["average", "--every", "2"], "no run in runs/"),
        (["report", "nowhere"], "not a run"),
        (["eval", "nowhere"], "nowhere does not exist"),
        (["pretrain", "--config", "none.yaml"], "cannot read the config none.yaml"),
        ([*PRETRAIN], "data/documents"),
        ([*PRETRAIN, "--branch", "1", "--from", "3"], "data/documents"),
        ([*PRETRAIN, "--set", "train.device=gpu"], "is not a device"),
        ([*PRETRAIN, "--set", "train.device=cuda:9"], "this machine has"),
        ([*PRETRAIN, "--set", "optimizer.LR=3"], "did you mean lr?"),
        (["verify", "nowhere"], "nowhere"),
        (["prepare", "nothing.jsonl"], "nothing.jsonl"),
    ],
)
def test_errors_are_one_message_and_a_hint(
    workplace: Path, arguments: list[str], expected: str
) -> None:
    result = invoke(*arguments, cwd=workplace)
    assert result.code == 2
    assert expected in result.stderr
    assert "hint:" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (workplace / "runs").exists()


def test_a_symlink_loop_is_an_error_of_the_path(workplace: Path) -> None:
    (workplace / "here").symlink_to("there")
    (workplace / "there").symlink_to("here")
    for command in (["report", "here"], ["prepare", "documents.jsonl", "--out", "here/data"]):
        result = invoke(*command, cwd=workplace)
        assert result.code in (1, 2)  # since Python 3.13, `report` finds no run there
        assert "error:" in result.stderr
        assert "this is a bug" not in result.stderr


def test_debug_prints_the_traceback(workplace: Path, llmtrain: Command) -> None:
    result = llmtrain("--debug", "report", "nowhere", cwd=workplace)
    assert "Traceback" in result.stderr


def test_an_invalid_command_line_exits_with_2(workplace: Path) -> None:
    assert invoke("pretrain", cwd=workplace).code == 2
    assert invoke("pretrian", cwd=workplace).code == 2


def test_module_and_command_print_the_version(workplace: Path, llmtrain: Command) -> None:
    version = llmtrain("--version", cwd=workplace).stdout
    command = [sys.executable, "-m", "llmtrain", "--version"]
    module = subprocess.run(command, capture_output=True, text=True, check=True, cwd=workplace)
    assert module.stdout == version
    assert version.startswith("llmtrain ")


@pytest.mark.parametrize(
    "command", ["prepare", "pretrain", "average", "eval", "report", "runs", "verify"]
)
def test_every_command_has_help(workplace: Path, command: str) -> None:
    result = invoke(command, "--help", cwd=workplace)
    assert result.code == 0
    assert "Usage:" in result.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from llmtrain.cli.main import app\n"
        "heavy = {'torch', 'datasets', 'numpy', 'wandb', 'matplotlib', 'transformers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]
)
def test_a_signal_saves_the_state_and_the_same_command_resumes(
    prepared: Path, number: int, code: int
) -> None:
    process = subprocess.Popen(
        [BIN / "llmtrain", *PRETRAIN, *ENDLESS],
        cwd=prepared,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not step_folders(prepared / "runs/tiny/snapshots") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert "training checkpoint saved" in errors
    (step,) = step_folders(prepared / "runs/tiny/state")
    longer = [*PRETRAIN, "--set", f"train.max_steps={step + 5}"]
    again = invoke(*longer, cwd=prepared)
    assert again.code == 0, again.stderr
    assert f"resumed at step {step:,}" in again.stdout
    assert "Already finished" in invoke(*longer, cwd=prepared).stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["recipes", "recipes --json", "plan --config configs/demo.yaml"]
)
def test_a_closed_pipe_ends_a_command_with_its_own_code(command: str) -> None:
    script = f"{BIN}/llmtrain {command} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("closed", ["2>&-", "0<&- 1>&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_standard_descriptor(
    tmp_path: Path, closed: str
) -> None:
    script = """
import sys
from llmtrain.cli.main import main

sys.argv = ["llmtrain", "--version"]
try:
    main()
finally:
    with open("file", "w") as file:
        file.write(str(file.fileno()))
"""
    command = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, script]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert int((tmp_path / "file").read_text()) > 2


@pytest.mark.slow
@pytest.mark.parametrize("pipe", ["|", "2>&1 |"])
def test_a_closed_pipe_saves_the_state(prepared: Path, pipe: str) -> None:
    command = shlex.join([f"{BIN}/llmtrain", *PRETRAIN, *ENDLESS, "--set", "log.every=1"])
    script = f"{command} {pipe} head -90 > /dev/null; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", script],
        cwd=prepared,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 141
    assert "Traceback" not in result.stderr
    assert len(step_folders(prepared / "runs/tiny/state")) == 1


def test_the_next_command_can_be_pasted(prepared: Path) -> None:
    copied = invoke("recipes", "demo", "--to", "my demo.yaml", cwd=prepared)
    trained = invoke(*PRETRAIN, "--run-dir", "my run", cwd=prepared)
    following = [
        shlex.split(result.stdout.rpartition("llmtrain ")[2]) for result in (copied, trained)
    ]
    assert following[0] == ["pretrain", "--config", "my demo.yaml"]
    assert following[1] == ["average", "my run", "--every", "N"]


def test_pretrain_refuses_folders_with_other_files(prepared: Path) -> None:
    (prepared / "mine" / ".tmp-work").mkdir(parents=True)
    for folder in ("mine", "tiny.yaml"):
        result = invoke(*PRETRAIN, "--run-dir", folder, cwd=prepared)
        assert result.code == 2
        assert f"{folder} exists and is not a run" in result.stderr
    assert (prepared / "mine" / ".tmp-work").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
@pytest.mark.parametrize(
    ("command", "code"), [("recipes demo", 0), ("recipes --json", 0), ("report nowhere", 2)]
)
def test_a_closed_descriptor_is_like_dev_null(
    tmp_path: Path, command: str, code: int, closed: str
) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{BIN}/llmtrain {command} {closed}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert "this is a bug" not in done.stderr
