"""Fixtures for all layers: prepared text, a tiny configuration, runs, the command."""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from places import REPOSITORY, SHARED_DATA

if TYPE_CHECKING:
    from tiny_runs import MakeRun

    from llmtrain.storage.run_folder import RunFolder


# Threads slow down tiny models.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests must not use the caches or accounts of the user.
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
# The duration of an example depends on the load of the machine.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def _restore_sigint() -> None:
    # A shell that starts the tests with `&` makes them and their children ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf-home"))
    os.environ["LLMTRAIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty English documents as JSON lines; fixed, so that losses are reproducible."""
    import json

    text = (REPOSITORY / "tests" / "text.txt").read_text()
    size = max(len(text) // 40, 200)
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    documents = [text[start : start + size] for start in range(0, len(text) - size, size)][:40]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="session")
def real_texts() -> list[str]:
    """752 documents (2.3 MB) of real English, in order."""
    import io
    import json

    import pyarrow as pa

    path = SHARED_DATA / "webmix-val.jsonl.zst"
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    with pa.input_stream(str(path), compression="zstd") as stream:
        return [json.loads(line)["text"] for line in io.BufferedReader(stream)]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Token shards of `text_file` with the byte tokenizer and a tenth in the val split."""
    from preparations import prepare

    folder = tmp_path_factory.mktemp("data") / "text"
    prepare(str(text_file), folder, tokenizer="byte", val_fraction=0.1)
    return folder


@pytest.fixture(scope="session")
def tiny(data_folder: Path) -> Callable[..., Any]:
    """Build a configuration that trains in a second; keyword `section__key` overrides."""
    from llmtrain.config.schema import RunConfig

    def build(**overrides: Any) -> RunConfig:
        values: dict[str, Any] = {
            "name": "tiny",
            "data": {"path": str(data_folder), "block_size": 16},
            "model": {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 264},
            "optimizer": {"lr": 1e-2},
            "schedule": {"name": "constant", "warmup_steps": 2},
            "train": {
                "max_steps": 12,
                "batch_sequences": 8,
                "micro_batch": 4,
                "precision": "float32",
                "compile": False,
                "device": "cpu",
            },
            "checkpoint": {"snapshot_every": 2, "state_every": 4},
            "averages": [{"kind": "ema", "decay": 0.9, "save_every": 4}],
            "eval": {"every": 6, "batch": 4},
            "log": {"every": 3},
        }
        for key, value in overrides.items():
            section, _, name = key.partition("__")
            if name:
                values[section] = values[section] | {name: value}
            else:
                values[section] = value
        return RunConfig.model_validate(values)

    return build


@pytest.fixture(scope="session")
def llmtrain() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the installed `llmtrain` command in a subprocess."""
    command = Path(sys.executable).parent / "llmtrain"

    def run(
        *arguments: str | Path, cwd: Path, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [command, *map(str, arguments)],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture
def make_run(tmp_path: Path) -> "MakeRun":
    """Write a run with snapshots at the given steps, without training."""

    from tiny_runs import SHAPE, weights_at

    from llmtrain.checkpoints.checkpoint import Origin
    from llmtrain.checkpoints.gpt2_folder import save_weights
    from llmtrain.config.loading import dump_config
    from llmtrain.config.schema import RunConfig
    from llmtrain.storage.commit import staged_folder
    from llmtrain.storage.run_folder import RunFolder

    def make(steps: Sequence[int], *, warmup: int = 0, name: str = "tiny") -> "RunFolder":
        run = RunFolder(tmp_path / "runs" / name)
        run.path.mkdir(parents=True)
        config = RunConfig.model_validate(
            {
                "name": name,
                "data": {"path": "data/none", "block_size": SHAPE.block_size},
                "model": SHAPE.model.model_dump(),
                "schedule": {"name": "constant", "warmup_steps": warmup},
                "train": {"max_steps": max(steps), "batch_sequences": 4, "micro_batch": 4},
            }
        )
        run.config.write_text(dump_config(config))
        for step in steps:
            with staged_folder(run.snapshot(step)) as folder:
                save_weights(
                    folder, weights_at(step), SHAPE, Origin(step, step * 64, 1e-3 / step, name)
                )
        return run

    return make


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files with most slow tests first, to balance the workers; skip GPU tests on a CPU."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: slow[item.path], reverse=True)
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
