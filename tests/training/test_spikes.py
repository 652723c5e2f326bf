"""Bad batches in real training are skipped or rewound, exactly also after an interruption."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_batches import BAD_BATCH, CHECKPOINT, SPIKES, bad_batches, run_config
from tiny_training import EVERY_AVERAGE, Build, assert_same_run, events, interrupt_at, quiet
from torch import Tensor, nn

import llmtrain.training.run as module
from llmtrain.config.schema import RunConfig
from llmtrain.errors import RunFailed, UserError
from llmtrain.runtime.signals import Interrupted
from llmtrain.storage.integrity import write_integrity
from llmtrain.storage.run_folder import RunFolder, step_folders
from llmtrain.training.run import pretrain
from llmtrain.training.trainer import Trainer

Poison = Callable[..., None]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch, tiny: Build) -> Poison:
    """Return a function that multiplies the loss of some batches in all trainings."""

    def apply(factor: float, *batches: int) -> None:
        monkeypatch.setattr(module, "compile_model", bad_batches(tiny, factor, *batches))

    return apply


@pytest.fixture(scope="module")
def rewound(tiny: Build, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An uninterrupted run with a rewind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "compile_model", bad_batches(tiny, 50.0))
        return quiet(run_config(tiny, "rewind"), tmp_path_factory.mktemp("rewound") / "run")


def few_checkpoints(tiny: Build) -> RunConfig:
    checkpoint = CHECKPOINT | {"keep_states": 2}
    return run_config(tiny, "rewind", checkpoint=checkpoint, eval={"every": 24, "batch": 64})


@pytest.fixture(scope="module")
def rewound_with_few(tiny: Build, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An uninterrupted run with a rewind that keeps few checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "compile_model", bad_batches(tiny, 50.0))
        return quiet(few_checkpoints(tiny), tmp_path_factory.mktemp("few") / "run")


def weights(run: RunFolder, step: int) -> bytes:
    return (run.snapshot(step) / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_nonfinite_step_is_skipped_and_counted(
    tiny: Build, tmp_path: Path, poison: Poison
) -> None:
    poison(float("nan"))
    run = quiet(run_config(tiny, on_nonfinite="skip"), tmp_path / "run")
    assert weights(run, 14) == weights(run, 15)
    assert weights(run, 15) != weights(run, 16)
    (event,) = [e for e in events(run) if "incident" in e]
    assert (event["step"], event["incident"], event["action"]) == (15, "nonfinite", "skip")
    assert event["loss"] is None
    assert [e["skipped"] for e in events(run) if "skipped" in e] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert "NaN" not in run.metrics.read_text()
    from safetensors.torch import load_file

    state = load_file(run.state(24) / "tensors.safetensors")
    assert {float(t) for name, t in state.items() if name.startswith("optimizer/step/")} == {23.0}


@pytest.mark.slow
def test_a_stopped_run_can_continue_with_skip(tiny: Build, tmp_path: Path, poison: Poison) -> None:
    poison(float("inf"))
    whole = quiet(run_config(tiny, on_nonfinite="skip"), tmp_path / "whole")
    with pytest.raises(RunFailed, match="stopped at step 15, update skipped: loss inf") as caught:
        quiet(run_config(tiny), tmp_path / "run")
    assert "train.on_nonfinite=skip" in caught.value.hint
    assert_same_run(whole, quiet(run_config(tiny, on_nonfinite="skip"), tmp_path / "run"))


@pytest.mark.slow
def test_a_spike_is_logged_or_skipped(tiny: Build, tmp_path: Path, poison: Poison) -> None:
    poison(50.0)
    for action, same in (("log", False), ("skip", True)):
        run = quiet(run_config(tiny, action), tmp_path / action)
        assert (weights(run, 14) == weights(run, 15)) == same
        (event,) = [e for e in events(run) if "incident" in e]
        assert (event["step"], event["incident"], event["action"]) == (15, "spike", action)
        assert event["z_loss"] > 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factor", "policy", "optimizer"),
    [
        (50.0, ("rewind", "stop"), "adamw"),
        (float("nan"), ("log", "rewind"), "muon"),
    ],
)
def test_a_rewind_restores_a_checkpoint_and_skips_the_batches(
    tiny: Build,
    tmp_path: Path,
    poison: Poison,
    factor: float,
    policy: tuple[str, str],
    optimizer: str,
) -> None:
    poison(factor)
    more = {"averages": EVERY_AVERAGE, "optimizer": {"name": optimizer, "lr": 1e-2}}
    config = run_config(tiny, *policy, **more)
    run = quiet(config, tmp_path / "run")
    (record,) = [e for e in events(run) if "rewound_from" in e]
    # The newest checkpoint at least 4 steps before step 15 is that of step 8: skip 8 to 14.
    assert (record["step"], record["rewound_from"], record["passed_batches"]) == (8, 15, 7)
    assert [e["step"] for e in events(run)] == sorted(e["step"] for e in events(run))
    assert [e["step"] for e in events(run) if "lr" in e] == [3, 6, 9, 12, 15, 18, 21, 24]
    taken_back = (run.path / "metrics-rewound.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in taken_back][-1] == 15
    assert (run.snapshots / "step-00000012-rewound").is_dir()
    # A second run skips the batches without a rewind.
    other = quiet(run_config(tiny, **more, train__max_steps=8), tmp_path / "other")
    facts = json.loads((other.state(8) / "state.json").read_text())
    facts["progress"]["passed_batches"] = 7
    (other.state(8) / "state.json").write_text(json.dumps(facts))
    write_integrity(other.state(8))
    quiet(run_config(tiny, **more), other.path)
    for step in (9, 24):
        assert weights(run, step) == weights(other, step)
    for label in ("ema-0.9", "running-mean"):
        one, two = (each.average(label, 24) / "model.safetensors" for each in (run, other))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 18, 20, 22, 26, 28, 29, 31, 36, 50])
def test_an_interrupted_run_with_a_rewind_resumes_exactly(
    tiny: Build,
    tmp_path: Path,
    poison: Poison,
    rewound_with_few: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    """Two signal checks per step; a rewind never uses the checkpoint of an interruption."""
    poison(50.0)
    config = few_checkpoints(tiny)
    with monkeypatch.context() as patch:
        interrupt_at(patch, after)
        with pytest.raises(Interrupted):
            quiet(config, tmp_path / "parts")
    assert_same_run(rewound_with_few, quiet(config, tmp_path / "parts"))


@pytest.mark.slow
@pytest.mark.parametrize("line", [2, 8, 9])
def test_a_run_stopped_by_a_closed_pipe_resumes_exactly(
    tiny: Build, tmp_path: Path, poison: Poison, rewound: RunFolder, line: int
) -> None:
    """`| head` ends before the line of a step, a spike, a rewind."""
    poison(50.0)
    config, lines = run_config(tiny, "rewind"), iter(range(1, 100))

    def log(_: str) -> None:
        if next(lines) >= line:
            raise BrokenPipeError

    with pytest.raises(Interrupted):
        pretrain(config, tmp_path / "parts", log=log)
    assert_same_run(rewound, quiet(config, tmp_path / "parts"))


@pytest.mark.slow
@pytest.mark.parametrize("crash", ["save", "set_aside_after", "rewind"])
def test_a_crash_during_a_rewind_changes_nothing(
    tiny: Build,
    tmp_path: Path,
    poison: Poison,
    rewound: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    crash: str,
) -> None:
    """Kill the process before each of the three writes of a rewind."""
    import llmtrain.training.trainer as trainer_module
    from llmtrain.training.checkpoint_writer import CheckpointWriter
    from llmtrain.training.metrics import MetricsLog

    poison(50.0)
    config = run_config(tiny, "rewind")

    class KilledError(Exception):
        pass

    def killed(*arguments: Any, replace: bool = True, **options: Any) -> None:
        if replace:
            raise KilledError
        real(*arguments, replace=replace, **options)

    with monkeypatch.context() as patch:
        owner: Any = {
            "save": CheckpointWriter,
            "set_aside_after": trainer_module,
            "rewind": MetricsLog,
        }[crash]
        real = getattr(owner, crash)
        patch.setattr(owner, crash, killed)
        with pytest.raises(KilledError):
            quiet(config, tmp_path / "parts")
    assert_same_run(rewound, quiet(config, tmp_path / "parts"))


@pytest.mark.slow
def test_a_rewind_soon_after_the_start_restores_it(
    tiny: Build, tmp_path: Path, poison: Poison
) -> None:
    """A branch from step 13 spikes at step 15, and at step 14 of the second attempt."""
    poison(50.0, BAD_BATCH, 15)
    trunk = quiet(run_config(tiny, train__max_steps=13), tmp_path / "trunk")
    branch = quiet(run_config(tiny, "rewind"), tmp_path / "branch", resume=trunk.state(13))
    rewinds = [(e["step"], e["rewound_from"]) for e in events(branch) if "rewound_from" in e]
    assert rewinds == [(13, 15), (13, 14)]


@pytest.mark.slow
def test_several_rewinds_keep_all_attempts(
    tiny: Build, tmp_path: Path, poison: Poison, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 15 spikes, then step 12 of the second attempt; kills in between add nothing."""
    poison(50.0, BAD_BATCH, 18)
    config, calm = (run_config(tiny, action, train__max_steps=16) for action in ("rewind", "log"))
    first = quiet(calm, tmp_path / "calm")
    whole, parts = quiet(config, tmp_path / "whole"), RunFolder(tmp_path / "parts")
    rewinds = [(e["step"], e["rewound_from"]) for e in events(whole) if "rewound_from" in e]
    assert rewinds == [(8, 15), (8, 12)]
    aside = [
        folder / "model.safetensors" for folder in sorted(whole.snapshots.glob("step-00000009-*"))
    ]
    assert [path.parent.name for path in aside] == [
        "step-00000009-rewound",
        "step-00000009-rewound-2",
    ]
    assert aside[0].read_bytes() == weights(first, 9) != aside[1].read_bytes() != weights(whole, 9)

    class KilledError(Exception):
        pass

    def kill_at(rewinds: int) -> None:
        def killed(trainer: Trainer) -> None:
            if (len(trainer.progress.rewinds), trainer.progress.step) == (rewinds, 11):
                raise KilledError
            real(trainer)

        real = Trainer.save_snapshot
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "save_snapshot", killed)
            with pytest.raises(KilledError):
                quiet(config, parts.path)

    kill_at(1)
    kill_at(2)
    quiet(config, parts.path)
    assert_same_run(whole, parts)
    assert {path.name for path in whole.snapshots.iterdir()} == {
        path.name for path in parts.snapshots.iterdir()
    }


@pytest.mark.slow
def test_an_unstable_run_fails_after_the_last_rewind(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "compile_model", lambda worker, micro_batch: _Nan(worker.model))
    config = run_config(tiny, "rewind", "rewind")
    with pytest.raises(RunFailed, match=r"training is unstable: step .* would need rewind 11"):
        quiet(config, tmp_path / "run")


class _Nan(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.model(tokens, targets)
        return loss * float("nan")


def test_rewind_steps_must_fit_the_kept_checkpoints(tiny: Build) -> None:
    with pytest.raises(ValueError, match=r"spikes.rewind_steps \(100\) .* \(4\)"):
        tiny(spikes={"action": "rewind"}, checkpoint={"snapshot_every": 2, "state_every": 4})


def test_a_resumed_run_may_change_the_policy_but_not_the_window(
    tiny: Build, tmp_path: Path
) -> None:
    config = run_config(tiny, train__max_steps=4)
    quiet(config, tmp_path / "run")
    quiet(run_config(tiny, "skip", "rewind", train__max_steps=5), tmp_path / "run")
    with pytest.raises(UserError, match=r"spikes.window: 8 there, 9 here"):
        quiet(
            tiny(spikes=SPIKES | {"window": 9}, checkpoint=CHECKPOINT, model__dropout=0.1),
            tmp_path / "run",
        )


def test_a_run_with_rewinds_saves_a_checkpoint_at_step_0(tiny: Build, tmp_path: Path) -> None:
    run = quiet(run_config(tiny, "rewind", train__max_steps=4), tmp_path / "run")
    assert list(step_folders(run.states)) == [0, 4]
