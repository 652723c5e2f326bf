"""The weights that generate and export use: the best measured ones of the newest step."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import invoke
from tiny_training import quiet

from llmtrain.averaging.average import average
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.request import AverageRequest
from llmtrain.checkpoints.resolve import find_targets
from llmtrain.checkpoints.series import run_series
from llmtrain.config.schema import RunConfig
from llmtrain.evaluation.loss import measure_losses
from llmtrain.evaluation.options import EvalOptions
from llmtrain.evaluation.selection import choose_weights
from llmtrain.storage.run_folder import RunFolder, step_name


def make_run(path: Path, labels: list[str], events: list[dict[str, float]]) -> RunFolder:
    """Write a run whose weights are empty folders at steps 10 and 20, and its metrics."""
    for folder in ("snapshots", *(f"averages/{label}" for label in labels)):
        for step in (10, 20):
            (path / folder / step_name(step)).mkdir(parents=True)
    config = "name: x\ndata: {path: x}\ntrain: {batch_sequences: 16}\n"
    (path / "config.yaml").write_text(config)
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return RunFolder(path)


def loss(step: int, tokens: int, raw: float, **averages: float) -> dict[str, float]:
    labelled = {f"val/loss/{label}": value for label, value in averages.items()}
    return {"step": step, "val/tokens": tokens, "val/loss": raw, **labelled}


def test_raw_weights_are_selected_if_they_were_measured_as_better(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["a", "b"], [loss(20, 99, 2.0, a=2.5, b=2.25)])
    chosen = choose_weights(str(run.path))
    assert (chosen.weights.label, chosen.weights.step) == ("raw", 20)
    assert chosen.average is not None and chosen.average.label == "b"
    assert chosen.reason.startswith("loss 2.0000 on 99 tokens in")
    assert chosen.reason.endswith("the lowest of 3 measured at this step")


def test_losses_on_other_tokens_are_not_compared(tmp_path: Path) -> None:
    events = [loss(20, 99, 2.0, a=1.5), loss(20, 9, 1.0)]  # nine easy tokens
    chosen = choose_weights(str(make_run(tmp_path / "run", ["a"], events).path))
    assert (chosen.weights.label, chosen.reason.split(" on ")[0]) == ("a", "loss 1.5000")


def test_the_reason_states_what_is_not_measured_and_what_is_better(tmp_path: Path) -> None:
    events = [loss(10, 99, 1.25, a=1.0), loss(20, 99, 2.0, a=1.5)]
    run = make_run(tmp_path / "run", ["a", "new"], events)
    chosen = choose_weights(str(run.path))
    assert chosen.weights.path == run.average("a", 20)
    assert f"not measured yet: new (run llmtrain eval {run.path})" in chosen.reason
    assert f"{run.average('a', 10)} is better, with 1.0000" in chosen.reason


def test_without_losses_the_first_average_is_selected(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ["b", "a"], [])
    chosen = choose_weights(str(run.path))
    assert chosen.weights.path == run.average("a", 20)
    assert chosen.reason == f"newest step, not measured yet: run llmtrain eval {run.path}"
    only_raw = make_run(tmp_path / "raw", [], [])
    assert choose_weights(str(only_raw.path)).weights.path == only_raw.snapshot(20)


@pytest.mark.slow
def test_the_commands_use_what_eval_measured_and_say_so(
    tiny: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run = quiet(tiny(averages=[]), tmp_path / "run")
    series = run_series(run)
    average(series, make_specs(series, AverageRequest(method="lawa", every=2, window=3)))
    targets = find_targets(run.path)
    rows = measure_losses(targets, EvalOptions(), lambda *progress: None)
    best = min(rows, key=lambda row: row.loss)
    shown = invoke("generate", run.path, "--max-tokens", "1", "--json", cwd=tmp_path)
    exported = invoke("export", run.path, "--to", tmp_path / "out", "--json", cwd=tmp_path)
    reason = f"(loss {best.loss:.4f} on {best.tokens:,} tokens in float32, the lowest of 2"
    for outcome in (shown, exported):
        assert f"{best.label}: {best.path} {reason}" in outcome.stderr
    assert json.loads(shown.stdout)[0]["label"] == json.loads(exported.stdout)["label"]
    explicit = run.average("lawa-3x2", 12)
    assert choose_weights(str(explicit)).weights.path == explicit
