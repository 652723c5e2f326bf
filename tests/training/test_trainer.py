"""Training end to end: against a plain loop, resumed, interrupted, diverged."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_training import EVERY_AVERAGE, Build, assert_same_run, events, interrupt_at, quiet
from transformers import AutoModelForCausalLM

from llmtrain.checkpoints.gpt2_folder import load_model, load_weights
from llmtrain.config.loading import load_config
from llmtrain.config.schedules import learning_rate
from llmtrain.data.dataloader import read_windows
from llmtrain.data.sampler import Sampler
from llmtrain.data.token_data import open_data
from llmtrain.errors import RunFailed, UserError
from llmtrain.model.gpt import GPT
from llmtrain.runtime.signals import Interrupted
from llmtrain.storage import integrity
from llmtrain.storage.integrity import integrity_problems
from llmtrain.storage.json_files import read_json_lines
from llmtrain.storage.run_folder import RunFolder, step_folders
from llmtrain.training.run import pretrain


def test_training_equals_a_plain_loop(tiny: Build, tmp_path: Path) -> None:
    """Accumulation, clipping, schedule and AdamW."""
    config = tiny()
    run = quiet(config, tmp_path / "run")
    data = open_data(Path(config.data.path))
    reader = data.reader("train")
    sampler = Sampler(len(reader), 16, 8, config.seed)
    model = GPT(config.model, 16, config.seed)
    decayed = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    others = [p for p in model.parameters() if not any(p is d for d in decayed)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False,
    )  # fmt: skip
    losses = []
    for step in range(12):
        windows = torch.from_numpy(read_windows(reader, sampler.rows(step), 16))
        loss = model(windows[:, :-1], windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, config.schedule, 1e-2, 12)
        optimizer.step()
        losses.append(loss.item())
    logged = {e["step"]: e["loss"] for e in events(run) if "loss" in e}
    assert logged == pytest.approx({step: losses[step - 1] for step in (3, 6, 9, 12)}, rel=1e-4)
    trained = load_weights(run.snapshot(12))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), atol=2e-4, rtol=2e-3)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_the_micro_batch_does_not_change_the_training(tiny: Build, tmp_path: Path) -> None:
    runs = [quiet(tiny(train__micro_batch=m), tmp_path / str(m)) for m in (1, 8)]
    losses = [[e["loss"] for e in events(run) if "loss" in e] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tiny: Build, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with dropout and all averages."""
    config = tiny(model__dropout=0.2, averages=EVERY_AVERAGE)
    return quiet(config, tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("cut", [3, 4, 5, 6, 11])
def test_a_resumed_run_equals_the_uninterrupted_one(
    tiny: Build, tmp_path: Path, whole: RunFolder, cut: int
) -> None:
    options = {"model__dropout": 0.2, "averages": EVERY_AVERAGE}
    parts = tmp_path / "parts"
    quiet(tiny(**options, train__max_steps=cut), parts)
    # Remove the events that the shorter run logged only because it ended.
    log = parts / "metrics.jsonl"
    kept = [e for e in read_json_lines(log) if not (e["step"] == cut and cut % 3)]
    kept = [e for e in kept if "loss" in e or e["step"] % 6 == 0]
    log.write_text("".join(json.dumps(e) + "\n" for e in kept))
    assert_same_run(whole, quiet(tiny(**options), parts))


@pytest.mark.parametrize(
    "after", [16, *(pytest.param(n, marks=SLOW) for n in (0, 1, 7, 21, 60, 90))]
)
def test_an_interrupted_run_resumes_exactly(
    tiny: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: RunFolder,
    after: int,
) -> None:
    """A signal at the n-th check: between micro-batches or during an evaluation."""
    config = tiny(model__dropout=0.2, averages=EVERY_AVERAGE)
    interrupt_at(monkeypatch, after)
    with pytest.raises(Interrupted) as caught:
        quiet(config, tmp_path / "parts")
    assert caught.value.exit_code == 143
    monkeypatch.undo()
    assert_same_run(whole, quiet(config, tmp_path / "parts"))


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_interrupted_at_every_step_resumes_exactly(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    """Forty sessions of one step, each resuming from the one before."""
    config = tiny(
        model__dropout=0.2,
        averages=EVERY_AVERAGE,
        train__max_steps=40,
        train__compile=compiled,
        optimizer={"lr": 1e-2, "name": "spam", "spam": {"reset_every": 12, "reset_warmup": 4}},
        spikes={"action": "skip", "window": 8, "threshold": 3.0},
        data__block_warmup={"start": 9, "steps": 7, "multiple_of": 1},
        eval={"every": 40, "batch": 4},
    )
    whole = quiet(config, tmp_path / "whole")
    sessions = 0
    for _ in range(60):
        if newest(tmp_path / "parts") == 40:
            break
        with monkeypatch.context() as patch:
            interrupt_at(patch, 3)  # in the first micro-batch of the next step
            try:
                quiet(config, tmp_path / "parts")
            except Interrupted:
                sessions += 1
    assert sessions >= 38
    assert_same_run(whole, quiet(config, tmp_path / "parts"))


def newest(folder: Path) -> int:
    """Return the step of the newest training checkpoint, or 0."""
    return max(step_folders(RunFolder(folder).states), default=0)


def test_block_warmup_equals_a_plain_loop(tiny: Build, tmp_path: Path) -> None:
    """The windows are those of a run without warm-up, cut to their first tokens."""
    config = tiny(
        data__block_warmup={"start": 4, "steps": 6, "multiple_of": 2},
        train__max_steps=8,
        optimizer={"lr": 1e-2, "weight_decay": 0.0, "grad_clip": 0.0},
    )
    run = quiet(config, tmp_path / "run")
    reader = open_data(Path(config.data.path)).reader("train")
    model = GPT(config.model, 16, config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    lengths = [4, 6, 8, 10, 12, 16, 16, 16]  # 4 + 12 · (step - 1) // 5, down to an even number
    for step, length in enumerate(lengths, start=1):
        rows = Sampler(len(reader), 16, 8, config.seed).rows(step - 1)
        windows = torch.from_numpy(read_windows(reader, rows, 16))[:, : length + 1]
        optimizer.zero_grad()
        model(windows[:, :-1], windows[:, 1:]).backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step, config.schedule, 1e-2, 8)
        optimizer.step()
    trained = load_weights(run.snapshot(8))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), atol=2e-4, rtol=2e-3)
    tokens = [e["tokens"] for e in events(run) if "tokens" in e]
    assert tokens == [8 * sum(lengths[:3]), 8 * sum(lengths[:6]), 8 * sum(lengths)]


@pytest.mark.slow
def test_events_after_the_resumed_step_are_removed(tiny: Build, tmp_path: Path) -> None:
    run = quiet(tiny(), tmp_path / "run")
    before = events(run)
    shutil.rmtree(run.state(12))
    with run.metrics.open("a") as file:
        file.write('{"step": 12, "torn')
    quiet(tiny(), run.path)
    assert events(run) == before


def test_a_run_writes_its_files(tiny: Build, tmp_path: Path) -> None:
    run = quiet(tiny(), tmp_path / "run")
    assert list(step_folders(run.snapshots)) == [4, 6, 8, 10, 12]
    assert list(step_folders(run.states)) == [8, 12]
    assert list(step_folders(run.averages / "ema-0.9")) == [4, 8, 12]
    for folder in (run.snapshot(4), run.state(12), run.average("ema-0.9", 8)):
        assert integrity_problems(folder) == []
    evaluations = [e for e in events(run) if "val/loss" in e]
    assert [e["step"] for e in evaluations] == [6, 12]
    assert set(evaluations[0]) == {"step", "val/tokens", "val/loss", "val/loss/ema-0.9"}
    training = [e for e in read_json_lines(run.metrics) if "loss" in e]
    assert [e["step"] for e in training] == [3, 6, 9, 12]
    assert [e["tokens"] for e in training] == [3 * 128, 6 * 128, 9 * 128, 12 * 128]
    assert {"lr", "grad_norm", "tokens_per_second", "seconds", "mfu"} <= set(training[0])
    assert load_config(run.config) == tiny()
    provenance = json.loads((run.average("ema-0.9", 8) / "provenance.json").read_text())
    assert (provenance["method"], provenance["updates"]) == ("ema", 8)


@pytest.mark.slow
def test_snapshots_load_in_transformers(tiny: Build, tmp_path: Path) -> None:
    run = quiet(tiny(), tmp_path / "run")
    tokens = torch.randint(0, 257, (2, 16))
    for folder in (run.snapshot(12), run.average("ema-0.9", 12)):
        theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            expected = theirs(tokens).logits
            torch.testing.assert_close(
                load_model(folder).logits(tokens), expected, atol=1e-4, rtol=0
            )


def test_a_finished_run_can_be_extended(tiny: Build, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    quiet(tiny(), folder)
    assert pretrain(tiny(), folder, log=lambda line: None).already_finished
    outcome = pretrain(tiny(train__max_steps=14), folder, log=lambda line: None)
    assert (outcome.step, outcome.already_finished) == (14, False)


def test_a_finished_run_keeps_no_more_checkpoints_than_asked(tiny: Build, tmp_path: Path) -> None:
    """After a kill between the last checkpoint and the removal of the oldest."""
    run = quiet(tiny(), tmp_path / "run")
    kept = list(step_folders(run.states))
    shutil.copytree(run.state(kept[0]), run.state(1))
    quiet(tiny(), run.path)
    assert list(step_folders(run.states)) == kept


@pytest.mark.slow
def test_a_jump_of_the_learning_rate_is_a_warning(tiny: Build, tmp_path: Path) -> None:
    cosine = {"name": "cosine", "warmup_steps": 2}
    quiet(tiny(schedule=cosine), tmp_path / "run")
    warnings: list[str] = []
    quiet(tiny(schedule=cosine, train__max_steps=14), tmp_path / "run", warn=warnings.append)
    assert "the learning rate jumps" in warnings[0]


def test_another_config_is_refused_with_its_keys(tiny: Build, tmp_path: Path) -> None:
    quiet(tiny(), tmp_path / "run")
    with pytest.raises(UserError, match=r"optimizer.lr: 0.01 there, 0.02 here"):
        quiet(tiny(optimizer__lr=2e-2), tmp_path / "run")
    with pytest.raises(UserError, match="--resume is never"):
        quiet(tiny(), tmp_path / "run", resume="never")


@pytest.mark.slow
def test_other_data_is_refused_except_in_a_branch(
    tiny: Build, tmp_path: Path, text_file: Path
) -> None:
    from preparations import prepare

    run = quiet(tiny(), tmp_path / "run")
    prepare(str(text_file), tmp_path / "other", tokenizer="byte", val_fraction=0.2)
    with pytest.raises(UserError, match="other data"):
        quiet(tiny(data__path=str(tmp_path / "other"), train__max_steps=14), tmp_path / "run")
    quiet(tiny(data__path=str(tmp_path / "other")), tmp_path / "branch", resume=run.state(8))
    quiet(tiny(data__path=str(tmp_path / "other"), train__max_steps=14), tmp_path / "branch")
    with pytest.raises(UserError, match="other data"):
        quiet(tiny(train__max_steps=16), tmp_path / "branch")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quiet(tiny(), tmp_path / "whole")
    run = quiet(tiny(), tmp_path / "run")
    damage(run.state(12) / "tensors.safetensors")
    warnings: list[str] = []
    quiet(tiny(), run.path, warn=warnings.append)
    assert "does not have the recorded BLAKE3" in warnings[0]
    assert (run.states / "step-00000012-damaged" / "tensors.safetensors").is_file()
    assert_same_run(whole, run)
    # Again, with a bad sector: both damaged folders are kept.
    real = integrity.digest_of

    def bad_sector(path: Path, algorithm: integrity.Algorithm = "blake3") -> integrity.Digest:
        if path.parent == run.state(12):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, algorithm)

    with monkeypatch.context() as patch:
        patch.setattr(integrity, "digest_of", bad_sector)
        quiet(tiny(), run.path, warn=warnings.append)
    assert "Input/output error" in warnings[1]
    assert len(list(run.states.glob("step-00000012-damaged*/tensors.safetensors"))) == 2
    assert_same_run(whole, run)


@pytest.mark.slow
def test_only_damaged_checkpoints_are_an_error(tiny: Build, tmp_path: Path) -> None:
    run = quiet(tiny(), tmp_path / "run")
    for folder in step_folders(run.states).values():
        damage(folder / "tensors.safetensors")
    for _ in range(2):
        with pytest.raises(UserError, match=r"every training checkpoint of .* is damaged"):
            quiet(tiny(), run.path, warn=lambda message: None)


def test_lost_checkpoints_do_not_restart_the_run(tiny: Build, tmp_path: Path) -> None:
    run = quiet(tiny(), tmp_path / "run")
    before = run.metrics.read_text()
    shutil.rmtree(run.states)
    with pytest.raises(UserError, match="lacks its training checkpoints"):
        quiet(tiny(), run.path)
    assert run.metrics.read_text() == before


def test_max_seconds_stops_the_run(tiny: Build, tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught:
        quiet(tiny(train__max_steps=100_000), tmp_path / "run", max_seconds=1.0)
    assert caught.value.exit_code == 124
    assert len(step_folders(RunFolder(tmp_path / "run").states)) > 0


def test_a_nonfinite_loss_stops_before_the_update(tiny: Build, tmp_path: Path) -> None:
    """A learning rate that overflows float32 after some steps; checkpoints stay intact."""
    every_step = {"snapshot_every": 1, "state_every": 1}
    config = tiny(optimizer={"lr": 1e30, "grad_clip": 0.0}, checkpoint=every_step)
    with pytest.raises(RunFailed, match=r"stopped at step \d+, update skipped: loss ") as caught:
        quiet(config, tmp_path / "run")
    assert "--branch NAME --from STEP" in caught.value.hint
    states = step_folders(RunFolder(tmp_path / "run").states)
    assert states
    assert all(integrity_problems(folder) == [] for folder in states.values())


def test_a_small_vocabulary_is_refused(tiny: Build, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocab_size 200 is smaller .* 257") as caught:
        quiet(tiny(model__vocab_size=200), tmp_path / "run")
    assert "model.vocab_size=320" in caught.value.hint
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bfloat16_trains_close_to_float32(tiny: Build, tmp_path: Path) -> None:
    runs = [quiet(tiny(train__precision=p), tmp_path / p) for p in ("float32", "bfloat16")]
    losses = [[e["loss"] for e in events(run) if "loss" in e] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_wandb_offline_writes_a_run(tiny: Build, tmp_path: Path) -> None:
    log = {"every": 3, "wandb": {"mode": "offline", "project": "test"}}
    run = quiet(tiny(log=log, train__max_steps=4), tmp_path / "run")
    written = list((run.path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(written) == 1
    state = json.loads((list(step_folders(run.states).values())[-1] / "state.json").read_text())
    assert state["progress"]["wandb_id"] in written[0].name
    quiet(tiny(log=log, train__max_steps=6), run.path)
    again = list((run.path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert all(state["progress"]["wandb_id"] in path.name for path in again)


@pytest.mark.slow
def test_every_online_average_is_evaluated_and_saved(tiny: Build, tmp_path: Path) -> None:
    run = quiet(tiny(averages=EVERY_AVERAGE), tmp_path / "run")
    last = [e for e in events(run) if "val/loss" in e][-1]
    labels = {key.removeprefix("val/loss/") for key in last if key.startswith("val/loss/")}
    assert labels == {
        "ema-0.9", "ema-0.5-every-2", "swa-from-6-every-2", "online-lawa-3x2",
        "running-mean", "power-ema-0.05", "power-ema-0.1",
    }  # fmt: skip
    assert {folder.name for folder in run.averages.iterdir()} == labels
    assert list(step_folders(run.averages / "running-mean")) == [4, 6, 8, 10, 12]
    assert (run.average("running-mean", 12) / "model.residual.safetensors").is_file()
    assert list(step_folders(run.averages / "online-lawa-3x2")) == [8, 12]
    raw = load_weights(run.snapshot(12))
    for label in labels:
        averaged = load_weights(run.average(label, 12))
        assert any(not torch.equal(raw[name], averaged[name]) for name in raw)
