"""The trajectory check: no warning for correct runs of any schedule, one for each chimera."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tiny_training import quiet

from llmtrain.averaging.average import average
from llmtrain.averaging.inspection import inspect_path
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.merge import Norms, merge
from llmtrain.averaging.request import AverageRequest, MergeOptions
from llmtrain.averaging.trajectory import outliers
from llmtrain.checkpoints.open import open_checkpoint
from llmtrain.checkpoints.series import folder_series, run_series
from llmtrain.config.schema import RunConfig
from llmtrain.errors import UserError
from llmtrain.storage.integrity import INTEGRITY_FILE
from llmtrain.storage.run_folder import RunFolder, step_folders

SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"name": "constant"},
    "cosine": {"name": "cosine", "min_lr": 1e-3},
    "linear": {"name": "linear", "min_lr": 0.0},
    "wsd": {"name": "wsd", "decay_steps": 40, "min_lr": 0.0},
}
Weights = dict[str, NDArray[np.float64]]


@pytest.fixture(scope="module", params=SCHEDULES)
def run(
    request: pytest.FixtureRequest,
    tiny: Callable[..., RunConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> RunFolder:
    """Return a run of 160 steps with the rate of the README and a snapshot every fourth step."""
    config = tiny(
        model={"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 264},
        schedule=SCHEDULES[request.param] | {"warmup_steps": 16},
        train__max_steps=160,
        checkpoint={"snapshot_every": 4, "state_every": 160},
        eval__every=160,
        averages=[],
    )
    return quiet(config, tmp_path_factory.mktemp("trajectory") / request.param)


@pytest.fixture(scope="module")
def trained(run: RunFolder) -> dict[int, Weights]:
    """Return the weights by step, with scalars and vectors of 4 and 16 elements cut from others."""
    found = {}
    for step, folder in step_folders(run.snapshots).items():
        weights = load_file(folder / "model.safetensors")
        arrays = {name: array.reshape(-1).astype(np.float64) for name, array in weights.items()}
        vectors = [name for name, array in arrays.items() if array.size == 32 and array.any()]
        cut = {f"{name}[:{n}]": arrays[name][:n] for name in vectors for n in (1, 4, 16)}
        found[step] = arrays | cut
    return found


def check(by_step: dict[int, Weights]) -> dict[int, str]:
    """Return the messages by step, with the norms that `merge` would compute."""
    names = tuple(next(iter(by_step.values())))
    rows = [[weights[name] for name in names] for weights in by_step.values()]
    norm = np.array([[np.linalg.norm(tensor) for tensor in row] for row in rows])
    distance, turn = np.zeros_like(norm), np.zeros_like(norm)
    for i in range(1, len(rows)):
        for column in range(len(names)):
            move = rows[i][column] - rows[i - 1][column]
            distance[i, column] = np.linalg.norm(move)
            if i > 1:
                turn[i, column] = move @ (rows[i - 1][column] - rows[i - 2][column])
    sizes = {
        name: SimpleNamespace(count=tensor.size)
        for name, tensor in zip(names, rows[0], strict=True)
    }
    checkpoints: Any = [SimpleNamespace(step=step, tensors=sizes) for step in by_step]
    found = outliers(checkpoints, Norms(names, norm, distance, turn))
    return {checkpoints[row].step: message for row, message in found.items()}


def windows(steps: list[int]) -> Iterator[list[int]]:
    """Yield windows of every size and spacing, the whole run, and unevenly spaced steps."""
    for spacing in (1, 2, 4, 8):
        yield steps[::spacing]
        for size in (2, 3, 5, 10):
            for end in range((size - 1) * spacing, len(steps), 3):
                yield steps[end - (size - 1) * spacing : end + 1 : spacing]
    generator = np.random.default_rng(0)
    for size in generator.integers(3, 10, 60):
        yield sorted(generator.choice(steps, size, replace=False).tolist())


@pytest.mark.slow
def test_honest_runs_are_silent_for_all_windows_and_spacings(trained: dict[int, Weights]) -> None:
    alarms = [
        message
        for window in windows(list(trained))
        for message in check({step: trained[step] for step in window}).values()
    ]
    assert alarms == []


def chimera(weights: Weights, other: Weights, kind: str) -> Weights:
    """Replace the embeddings and the first layer, as in the first shard of Pythia-12B."""
    generator = np.random.default_rng(1)
    change: Callable[[str, NDArray[np.float64]], NDArray[np.float64]] = {
        "step": lambda name, old: other[name],
        "seed": lambda name, old: generator.normal(size=old.size, scale=old.std()),
        "rescaled": lambda name, old: 3 * old,
        "zeros": lambda name, old: 0 * old,
        "permuted": lambda name, old: generator.permutation(old),
    }[kind]
    shard = [name for name in weights if "wte" in name or "wpe" in name or ".h.0." in name]
    return weights | {name: change(name, weights[name]) for name in shard}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["step", "seed", "rescaled", "zeros", "permuted"])
def test_a_chimera_is_found_inside_a_window(trained: dict[int, Weights], kind: str) -> None:
    steps = list(trained)
    for size, spacing in ((3, 1), (5, 1), (5, 2), (10, 1)):
        for first in range(0, len(steps) // 2 - size, 4):
            window = steps[first : first + size * spacing : spacing]
            for bad in window[1:-1:3]:
                series = {step: trained[step] for step in window}
                series[bad] = chimera(series[bad], trained[steps[-1]], kind)
                assert list(check(series)) == [bad]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["seed", "rescaled", "zeros", "permuted"])
@pytest.mark.parametrize("place", [0, -1])
def test_a_chimera_is_found_at_the_ends_of_a_window(
    trained: dict[int, Weights], kind: str, place: int
) -> None:
    steps = list(trained)
    for first in range(0, len(steps) - 5, 4):
        window = steps[first : first + 5]
        series = {step: trained[step] for step in window}
        bad = window[place]
        series[bad] = chimera(series[bad], trained[steps[-1]], kind)
        assert list(check(series)) == [bad]


def test_the_norms_of_a_merge_contain_the_turns(run: RunFolder) -> None:
    folders = list(step_folders(run.snapshots).items())[:4]
    opened = [open_checkpoint(folder, step=step) for step, folder in folders]
    norms = merge(opened, [], [])
    weights = [load_file(folder / "model.safetensors") for _, folder in folders]
    for column, name in enumerate(norms.names):
        moves = np.diff([w[name].reshape(-1).astype(np.float64) for w in weights], axis=0)
        turns = [0.0, 0.0, *(moves[i] @ moves[i - 1] for i in (1, 2))]
        scale = norms.distance[:, column].max() ** 2  # products are computed in float32
        assert norms.turn[:, column] == pytest.approx(turns, rel=1e-6, abs=1e-6 * scale)


def test_the_command_warns_about_others_only(run: RunFolder, tmp_path: Path) -> None:
    """Snapshots in a folder have a chimera like Pythia-12B's step 50,000; the run has none."""
    folder, bad = tmp_path / "series", 80
    for step, path in step_folders(run.snapshots).items():
        copied = shutil.copytree(path, folder / f"step{step}") / INTEGRITY_FILE
        copied.unlink()

    def warnings(series: Any, **options: Any) -> list[str]:
        found: list[str] = []
        specs = make_specs(series, AverageRequest(every=8, at="88"))
        average(series, specs, MergeOptions(**options), warn=found.append)
        return found

    assert warnings(run_series(run)) == []
    assert warnings(folder_series(folder), strict=True) == []
    shutil.rmtree("averages", ignore_errors=True)
    files = [folder / f"step{step}" / "model.safetensors" for step in (bad, 160)]
    mixed, final = map(load_file, files)
    shard = [name for name in mixed if "wte" in name or "wpe" in name or ".h.0." in name]
    save_file(mixed | {name: final[name] for name in shard}, files[0], {"format": "pt"})
    with pytest.raises(UserError, match="step 80 is off the trajectory"):
        warnings(folder_series(folder), strict=True)
    (line,) = warnings(folder_series(folder))
    assert line.startswith("step 80 is off the trajectory: transformer.")
    assert [facts.step for facts in inspect_path(folder) if facts.problems] == [bad]


@pytest.fixture(autouse=True)
def _in_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
