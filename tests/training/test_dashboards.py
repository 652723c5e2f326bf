"""TensorBoard and W&B contain the events of the log and never stop or block a run."""

import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import Build, events, interrupt_at, quiet
from wandb.proto.wandb_internal_pb2 import Record

from llmtrain.config.loading import dump_config
from llmtrain.runtime.signals import Interrupted
from llmtrain.storage.run_folder import RunFolder
from llmtrain.training.checkpoint import TrainingProgress
from llmtrain.training.dashboards import Dashboards

BOARD = {"every": 1, "tensorboard": True, "sample_tokens": 3}


def board_of(run: RunFolder) -> EventAccumulator:
    board = EventAccumulator(str(run.path / "tensorboard"))
    board.Reload()
    return board


@pytest.mark.slow
def test_tensorboard_contains_the_events_of_the_log(tiny: Build, tmp_path: Path) -> None:
    run = quiet(tiny(log=BOARD), tmp_path / "run")
    board = board_of(run)
    logged = events(run)
    for tag, key in (
        ("train/loss", "loss"),
        ("train/lr", "lr"),
        ("val/loss/ema-0.9", "val/loss/ema-0.9"),
    ):
        expected = [(e["step"], pytest.approx(e[key], rel=1e-6)) for e in logged if key in e]
        assert [(scalar.step, scalar.value) for scalar in board.Scalars(tag)] == expected
    assert {"train/tokens_per_second", "train/memory", "train/grad_norm"} <= set(
        board.Tags()["scalars"]
    )
    (text,) = [t for t in board.Tags()["tensors"] if t.startswith("val/sample")]
    assert [tensor.step for tensor in board.Tensors(text)] == [6, 12]
    (figure,) = board.Images("report/loss")  # from the final report
    assert (figure.width, figure.height) > (400, 200)


@pytest.mark.slow
def test_a_resume_repeats_no_point(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 30)
    with pytest.raises(Interrupted):
        quiet(tiny(log=BOARD), tmp_path / "run")
    monkeypatch.undo()
    # As after a kill: the steps after the previous checkpoint are trained again.
    run = RunFolder(tmp_path / "run")
    newest = max(run.states.iterdir())
    assert newest.name > "step-00000004"
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    quiet(tiny(log=BOARD), run.path)
    assert [scalar.step for scalar in board_of(run).Scalars("train/loss")] == list(range(1, 13))


def test_a_rewind_removes_later_points(tiny: Build, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    boards = Dashboards(run, tiny(log=BOARD), TrainingProgress(), warn=pytest.fail)
    for step in (1, 2, 3, 4):
        boards.log({"step": step, "loss": float(step)}, "train")
    boards.rewind(2)
    boards.log({"step": 3, "loss": 30.0}, "train")
    boards.close(finished=False)
    points = [(scalar.step, scalar.value) for scalar in board_of(run).Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.slow
def test_wandb_drops_nothing_after_a_rewind(tiny: Build, tmp_path: Path) -> None:
    config = tiny(log={"wandb": {"mode": "offline"}})
    boards = Dashboards(RunFolder(tmp_path), config, TrainingProgress(), warn=pytest.fail)
    first = [(1, 0.5), (2, 1.5), (3, 2.5), (4, 3.5)]
    for step, loss in first:
        boards.log({"step": step, "loss": loss}, "train")
    boards.rewind(2)
    second = [(3, 4.5), (4, 5.5), (5, 6.5)]
    for step, loss in second:
        boards.log({"step": step, "loss": loss}, "train")
    boards.close(finished=False)
    wandb.teardown()  # flush the finished run
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows = [
        {item.key or item.nested_key[0]: item.value_json for item in row.item}
        for row in (each.history for each in records(written) if each.HasField("history"))
    ]
    names = {each.run.display_name for each in records(written) if each.HasField("run")}
    assert names == {tmp_path.name}  # not `name` of the config: the folder may have been renamed
    assert [(int(row["step"]), float(row["train/loss"])) for row in rows] == first + second


def records(path: Path) -> Iterator[Record]:
    """Yield the records of a W&B file: blocks of 32 KiB with records split into typed pieces."""
    data, position, record = path.read_bytes(), 7, b""
    while position < len(data):
        if (left := 2**15 - position % 2**15) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a complete record, or its last piece
            yield Record.FromString(record)
            record = b""


@pytest.mark.slow
def test_samples_are_the_same_for_the_same_weights(tiny: Build, tmp_path: Path) -> None:
    runs = [quiet(tiny(log=BOARD), tmp_path / name) for name in "ab"]
    samples = [[e["sample"] for e in events(run) if "sample" in e] for run in runs]
    assert samples[0] == samples[1]
    assert all(" → " in sample for sample in samples[0])


def test_a_failed_dashboard_is_left_out(tiny: Build, tmp_path: Path) -> None:
    config, warnings = tiny(log=BOARD), list[str]()
    boards = Dashboards(RunFolder(tmp_path), config, TrainingProgress(), warn=warnings.append)
    boards.log({"step": 1, "loss": 2.0}, "train")
    boards.log({"step": 2, "text": "\udcff"}, "train")  # invalid in a protocol buffer
    boards.log({"step": 3, "loss": 2.0}, "train")
    boards.close(finished=True)
    assert [warning.split(" (")[0] for warning in warnings] == ["TensorBoard failed"]


@pytest.mark.slow
def test_a_failed_start_of_wandb_is_a_warning(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb.teardown()  # W&B caches the environment of an earlier test
    monkeypatch.setenv("WANDB_BASE_URL", "no address")
    config, warnings = tiny(log={"wandb": {"mode": "offline"}}), list[str]()
    boards = Dashboards(RunFolder(tmp_path), config, TrainingProgress(), warn=warnings.append)
    boards.log({"step": 1, "loss": 2.0}, "train")
    assert boards.wandb_id is None
    assert [warning.split(":")[0] for warning in warnings] == ["cannot start W&B"]


@pytest.mark.slow
def test_without_an_account_wandb_records_offline_and_asks_nothing(
    tiny: Build, tmp_path: Path, data_folder: Path
) -> None:
    """On a terminal, where W&B could ask; the report is an artifact."""
    config = tiny(
        log={"every": 3, "wandb": {"mode": "online"}},
        train__max_steps=4,
        data__path=str(data_folder),
    )
    (tmp_path / "run.yaml").write_text(dump_config(config))
    command = f"{Path(sys.executable).parent}/llmtrain pretrain --config run.yaml"
    environment = {
        "HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
        "NETRC": str(tmp_path / "none"),
    }
    done = subprocess.run(
        ["script", "--quiet", "--return", "--command", command, "/dev/null"],
        cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "cannot reach W&B: no account is configured" in " ".join(done.stdout.split())
    (written,) = (tmp_path / "runs" / "tiny" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"report.html" in written.read_bytes()
