"""Every kind of file, cut at 100 lengths and with 200 single bits flipped.

`verify` detects the damage. A reader returns its correct result or raises UserError or RunFailed. A
reader that checks hashes by default never returns a wrong result.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import model_at, write_checkpoint

from llmtrain.averaging.average import average
from llmtrain.averaging.inspection import inspect_path
from llmtrain.averaging.make_specs import make_specs
from llmtrain.averaging.request import AverageRequest
from llmtrain.checkpoints.checkpoint import load_origin
from llmtrain.checkpoints.gpt2_folder import load_model
from llmtrain.checkpoints.resolve import find_targets
from llmtrain.checkpoints.series import folder_series, run_series
from llmtrain.config.loading import load_config
from llmtrain.config.schema import RunConfig
from llmtrain.data.token_data import open_data
from llmtrain.data.verify import verify_below
from llmtrain.errors import RunFailed, UserError
from llmtrain.evaluation.curves import loss_curves, newest_results
from llmtrain.evaluation.loss import measure_losses
from llmtrain.evaluation.options import EvalOptions
from llmtrain.model import tokenizer
from llmtrain.storage.run_folder import RunFolder
from llmtrain.training.checkpoint import load_checkpoint, read_tensors
from llmtrain.training.run import pretrain

LENGTHS, BITS = 100, 200

pytestmark = pytest.mark.slow

Read = Callable[[Path], object]
"""Read files below the workplace; results are comparable."""


@pytest.fixture(scope="module")
def workplace(
    tmp_path_factory: pytest.TempPathFactory, data_folder: Path, tiny: Callable[..., RunConfig]
) -> Path:
    """A run with averages, results and a branch, its data, and other checkpoint formats."""
    place = tmp_path_factory.mktemp("damage")
    shutil.copytree(data_folder, place / "data")
    averages = [{"kind": "ema", "decay": 0.9, "save_every": 4}, {"kind": "running-mean"}]
    config = tiny(data__path=str(place / "data"), train__max_steps=8, averages=averages)
    pretrain(config, place / "run", log=lambda line: None)
    pretrain(
        config,
        place / "branch",
        resume=place / "run" / "state" / "step-00000004",
        log=lambda line: None,
    )
    measure_losses(
        find_targets(place / "run", every_snapshot=False), EvalOptions(), lambda *progress: None
    )
    for step in (10, 20):
        write_checkpoint(place / "shards" / f"step{step}", small(step), shards=2)
        (place / "pt").mkdir(exist_ok=True)
        torch.save({"model": small(step)}, place / "pt" / f"ckpt_{step}.pt")
        (place / "bin" / f"step{step}").mkdir(parents=True)
        torch.save(small(step), place / "bin" / f"step{step}" / "pytorch_model.bin")
    lawa(place)
    return place


def small(step: int) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model_at(step).items() if tensor.numel() < 1000}


# --- readers -----------------------------------------------------------------------------------


def folder_contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lawa(place: Path) -> object:
    """Average the run's snapshots, or return the existing average."""
    series = run_series(RunFolder(place / "run"))
    average(series, make_specs(series, AverageRequest(every=2, window=2)))
    return folder_contents(place / "run" / "averages" / "lawa-2x2" / "step-00000008")


def anew(series_of: Callable[[Path], Any], **request: Any) -> Read:
    """Return a reader that computes an average of a series again."""

    def read(place: Path) -> object:
        shutil.rmtree(place / "out", ignore_errors=True)
        series = series_of(place)
        average(series, make_specs(series, AverageRequest(out=place / "out", **request)))
        return folder_contents(place / "out")

    return read


def run_of(place: Path) -> Any:
    return run_series(RunFolder(place / "run"))


def averaged(name: str) -> Read:
    return anew(lambda place: folder_series(place / name), every=10, window=2)


def inspected(name: str) -> Read:
    return lambda place: [fact.path for fact in inspect_path(place / name)]


def weights(name: str) -> Read:
    return lambda place: load_model(place / name).n_parameters()


def state(place: Path) -> object:
    loaded = load_checkpoint(place / "run/state/step-00000008")
    return (
        loaded.progress,
        {name: tensor.tolist() for name, tensor in read_tensors(loaded.folder, {}).items()},
        loaded.average_updates,
    )


def tokens(place: Path) -> object:
    data = open_data(place / "data")
    reader = data.reader("train")
    return reader.read(0, len(reader)).shape, data.sha256


def resumed(place: Path) -> object:
    """Resume the finished branch with the command that created it."""
    config = load_config(place / "branch" / "config.yaml")
    start = place / "run" / "state" / "step-00000004"
    return pretrain(config, place / "branch", resume=start, log=lambda line: None).already_finished


def report(place: Path) -> object:
    return len(newest_results(RunFolder(place / "run"))), sorted(
        loss_curves(RunFolder(place / "run"))
    )


def ranks(place: Path) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer.resources, "files", lambda package: place)
        return len(tokenizer._gpt2_ranks())


# --- kinds -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A file and its readers."""

    file: str
    exact: tuple[Read, ...] = ()
    """Readers that never return a wrong result."""
    others: tuple[Read, ...] = ()
    """Readers of data without hashes; they may return another result."""
    hashed: bool = False
    """`verify` detects every damage."""


SNAPSHOT, AVERAGE, STATE = (
    "run/snapshots/step-00000008",
    "run/averages/ema-0.9/step-00000008",
    "run/state/step-00000008",
)
LAWA, MEAN = "run/averages/lawa-2x2/step-00000008", "run/averages/running-mean/step-00000008"
newest = anew(run_of, every=2, window=2)
dense = anew(run_of, method="dense", start=4, at="8")
KINDS = {
    "weights": Kind(
        f"{SNAPSHOT}/model.safetensors",
        (newest,),
        (weights(SNAPSHOT), inspected("run")),
        hashed=True,
    ),
    "config.json": Kind(f"{SNAPSHOT}/config.json", (newest,), (weights(SNAPSHOT),), hashed=True),
    "training.json": Kind(
        f"{SNAPSHOT}/training.json",
        (newest,),
        (inspected("run"), lambda p: type(load_origin(p / SNAPSHOT))),
        hashed=True,
    ),
    "older training.json": Kind(
        "run/snapshots/step-00000006/training.json", (newest,), hashed=True
    ),
    "integrity.json": Kind(f"{SNAPSHOT}/integrity.json", (newest,), (inspected("run"), report)),
    "average's weights": Kind(
        f"{AVERAGE}/model.safetensors", (), (weights(AVERAGE), report), hashed=True
    ),
    "provenance.json": Kind(f"{LAWA}/provenance.json", (), (lawa, inspected(LAWA)), hashed=True),
    "provenance.json of a stored average": Kind(
        f"{MEAN}/provenance.json", (dense,), (inspected(MEAN),), hashed=True
    ),
    "residual": Kind(f"{MEAN}/model.residual.safetensors", (dense,), hashed=True),
    "state": Kind(f"{STATE}/tensors.safetensors", (state,), hashed=True),
    "state.json": Kind(f"{STATE}/state.json", (state,), hashed=True),
    "state's integrity.json": Kind(f"{STATE}/integrity.json", (state,)),
    "shard": Kind("data/train-00000.bin", (), (tokens,), hashed=True),
    "manifest": Kind("data/manifest.json", (tokens,), hashed=True),
    "metrics": Kind("run/metrics.jsonl", (), (report,)),
    "result": Kind("run/evals/{first}", (), (report,)),
    "run's config": Kind(
        "run/config.yaml", (), (lambda place: type(load_config(place / "run/config.yaml")), newest)
    ),
    "parent.json": Kind("branch/parent.json", (resumed,)),
    "shard of weights": Kind(
        "shards/step10/model-00001-of-00002.safetensors",
        (),
        (averaged("shards"), inspected("shards")),
    ),
    "index": Kind(
        "shards/step20/model.safetensors.index.json", (), (averaged("shards"), inspected("shards"))
    ),
    "pt": Kind("pt/ckpt_10.pt", (), (averaged("pt"), inspected("pt"))),
    "bin": Kind("bin/step20/pytorch_model.bin", (), (averaged("bin"),)),
    "ranks": Kind("gpt2.tiktoken.xz", (ranks,)),
}


def damages(content: bytes, seed: str) -> Iterator[tuple[str, bytes]]:
    """Yield a description of each damage and the damaged content."""
    chance = random.Random(seed)
    lengths = range(len(content))
    for length in sorted(chance.sample(lengths, min(LENGTHS, len(lengths)))):
        yield f"cut at {length:,} of {len(content):,} bytes", content[:length]
    for bit in sorted(chance.sample(range(8 * len(content)), min(BITS, 8 * len(content)))):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit % 8} of byte {bit // 8:,} flipped", bytes(damaged)


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_detected_and_readers_survive(workplace: Path, name: str) -> None:
    kind = KINDS[name]
    path = workplace / kind.file.format(first=next((workplace / "run/evals").iterdir()).name)
    if name == "ranks":
        path.write_bytes((resources.files("llmtrain.model") / path.name).read_bytes())
    intact = path.read_bytes()
    right = {read: read(workplace) for read in (*kind.exact, *kind.others)}
    assert not found(path.parent) or not kind.hashed
    wrong = []
    try:
        for what, damaged in damages(intact, name):
            path.write_bytes(damaged)
            if kind.hashed and not found(path.parent) and not harmless(name, intact, damaged):
                wrong.append(f"{what}: verify reports nothing")
            for number, (read, result) in enumerate(right.items()):
                try:
                    given = read(workplace)
                except (UserError, RunFailed) as error:
                    assert str(error).strip() and error.hint
                except Exception as error:
                    wrong.append(f"{what}: reader {number} raises {type(error).__name__}: {error}")
                else:
                    if read in kind.exact and given != result:
                        wrong.append(f"{what}: reader {number} is wrong")
    finally:
        path.write_bytes(intact)
    assert not wrong, "\n".join([f"{len(wrong)} of them:", *wrong[:12]])


def found(folder: Path) -> list[str]:
    try:
        return [problem for check in verify_below(folder) for problem in check.problems]
    except UserError as error:
        return [str(error)]


def harmless(name: str, intact: bytes, damaged: bytes) -> bool:
    """Return whether only white space of the manifest changed; its hash ignores that."""
    return name == "manifest" and intact.split() == damaged.split()
