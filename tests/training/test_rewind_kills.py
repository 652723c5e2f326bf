"""A rewind that is killed between any two system calls loses and repeats no event."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_batches import bad_batches, run_config
from tiny_training import Build, assert_same_run, events, quiet

import llmtrain.training.run as module
from llmtrain.config.schema import RunConfig
from llmtrain.storage.run_folder import RunFolder
from llmtrain.training.spikes import SpikeEvent
from llmtrain.training.trainer import Trainer

CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")
"""System calls that change names or make content durable."""


class KilledError(BaseException):
    """A simulated kill; not an Exception, so that no handler continues after it."""


class Kill:
    """Failure of all system calls from the n-th on, which leaves the disk as SIGKILL would."""

    def __init__(self, after: int) -> None:
        self._left, self._patch = after, pytest.MonkeyPatch()

    def arm(self) -> None:
        for name in CALLS:
            self._patch.setattr(os, name, self._counted(getattr(os, name)))

    def disarm(self) -> None:
        self._patch.undo()

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left < 0:
                raise KilledError
            return real(*arguments, **options)

        return call


def run_until(config: RunConfig, folder: Path, kill: Kill) -> bool:
    """Train, kill within the rewind, and return whether it was reached."""
    real = Trainer._rewind

    def killed(trainer: Trainer, event: SpikeEvent) -> None:
        kill.arm()
        real(trainer, event)
        kill.disarm()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_rewind", killed)
        try:
            quiet(config, folder)
        except KilledError:
            return True
        finally:
            kill.disarm()
    return False


@pytest.mark.slow
def test_a_rewind_killed_between_any_two_system_calls_loses_nothing(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "compile_model", bad_batches(tiny, 50.0))
    config = run_config(tiny, "rewind", train__max_steps=16, averages=[])
    before, whole = tmp_path / "before", quiet(config, tmp_path / "whole")
    assert run_until(config, before, Kill(after=0))
    discarded = events(whole, whole.rewound_metrics)
    assert [each["step"] for each in discarded][-1] == 15
    calls, killed = 0, True
    while killed:
        parts = RunFolder(shutil.copytree(before, tmp_path / "parts"))
        kill = Kill(after=calls)
        killed = run_until(config, parts.path, kill)
        assert_same_run(whole, quiet(config, parts.path) if killed else parts)
        assert events(parts, parts.rewound_metrics) == discarded, f"after {calls} calls"
        # A kill between two calls of a cleanup may leave an empty temporary folder.
        names = [path.name for path in parts.snapshots.glob("step-*")]
        assert sorted(names) == sorted(path.name for path in whole.snapshots.glob("step-*"))
        shutil.rmtree(parts.path)
        calls += 1
    assert calls > 30


@pytest.mark.slow
def test_a_rewind_is_flushed_before_its_events_are_removed(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power loss, no rename may be missing while a later one is on the disk."""
    calls: list[tuple[str, Path]] = []
    real_fsync, real_finish = os.fsync, Trainer._finish_rewind

    def fsync(descriptor: int) -> None:
        calls.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink()))
        real_fsync(descriptor)

    def finish(trainer: Trainer) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("rename", "replace"):
                patch.setattr(os, name, recorded(getattr(os, name)))
            patch.setattr(os, "fsync", fsync)
            real_finish(trainer)

    def recorded(real: Callable[..., None]) -> Callable[..., None]:
        def rename(source: Path, target: Path) -> None:
            calls.append(("rename", target))
            real(source, target)

        return rename

    monkeypatch.setattr(module, "compile_model", bad_batches(tiny, 50.0))
    monkeypatch.setattr(Trainer, "_finish_rewind", finish)
    run = quiet(run_config(tiny, "rewind", train__max_steps=16), tmp_path / "run")
    before = calls[: calls.index(("rename", run.metrics))]
    renamed = {path for name, path in before if name == "rename"}
    assert {run.rewound_metrics, run.snapshots / "step-00000012-rewound"} <= renamed
    for number, (name, path) in enumerate(before):
        if name == "rename":
            assert ("fsync", path.parent) in before[number:], path
    flushed = before[: before.index(("rename", run.rewound_metrics))]
    assert any("metrics-rewound" in path.name for name, path in flushed if name == "fsync")
