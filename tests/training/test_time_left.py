"""The predicted time: steady after one slow interval, quick after a lasting change."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_training import Build, quiet

from llmtrain.training.metrics import MetricsLog, format_training
from llmtrain.training.time_left import WINDOW, TimeLeft
from llmtrain.training.trainer import Trainer


def test_a_slow_interval_changes_the_prediction_by_less_than_two_percent() -> None:
    noise, left = random.Random(1), TimeLeft()
    for _ in range(40):
        left.add(10, 10 * noise.uniform(0.95, 1.05), 0.0)
    before = left.predict(1000)
    left.add(10, 100.0, 0.0)  # ten times as slow
    assert left.predict(1000) == pytest.approx(before, rel=0.02)


def test_a_lasting_change_is_followed_within_eight_intervals() -> None:
    noise, left = random.Random(2), TimeLeft()
    for speed, intervals in ((1.0, 40), (2.0, WINDOW // 2 + 1)):
        for _ in range(intervals):
            left.add(10, 10 * speed * noise.uniform(0.95, 1.05), 0.0)
        assert left.predict(1000) == pytest.approx(1000 * speed, rel=0.05)


def test_pauses_count_with_their_mean() -> None:
    """Every fifth interval pauses for 20 s: 50 steps take 50 s and 20 s."""
    left = TimeLeft()
    for number in range(1, 101):
        paused = 20.0 if number % 5 == 0 else 0.0
        left.add(10, 10 + paused, paused)
    assert left.predict(500) == pytest.approx(700)


def test_the_eta_of_a_run_ignores_a_slow_step(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted: list[float] = []
    step, log = Trainer.step, MetricsLog.training

    def slow(trainer: Trainer, *arguments: Any) -> Any:
        time.sleep(3 if trainer.progress.step == 20 else 0.01)
        return step(trainer, *arguments)

    def training(metrics: MetricsLog, event: Any, eta: float) -> None:
        predicted.append(eta)
        log(metrics, event, eta)

    monkeypatch.setattr(Trainer, "step", slow)
    monkeypatch.setattr(MetricsLog, "training", training)
    config = tiny(train__max_steps=24, log={"every": 1})
    quiet(config, tmp_path / "run")
    assert predicted[20] < 2  # three steps are left; the last one alone predicts nine seconds


def test_an_eta_beyond_a_thousand_days_is_shortened() -> None:
    event: dict[str, Any] = dict.fromkeys(("step", "loss", "lr", "grad_norm"), 1)
    event |= {"tokens_per_second": 1.0, "mfu": None}
    for eta, text in ((3661.0, " 1:01:01"), (1e9, "> 999 d"), (1e300, "> 999 d")):
        assert format_training(event, eta).endswith(text)
