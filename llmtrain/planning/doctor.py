"""Check that a machine and a folder are ready for a run.

Why by trial: an old torch, a slow or full disk or a wrong tokenizer is otherwise noticed late.
"""

import os
import platform
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from llmtrain.config.schema import RunConfig, TrainConfig
from llmtrain.data.token_data import open_training_data
from llmtrain.errors import RunFailed, UserError
from llmtrain.model.tokenizer import load_tokenizer
from llmtrain.planning.memory import LESS_MEMORY, Layout, shortage, smallest_peak
from llmtrain.planning.sizes import disk_usage
from llmtrain.runtime.device import (
    available_memory,
    device_name,
    resolve_compile,
    resolve_device,
    resolve_precision,
)
from llmtrain.storage.disk import disk_errors, free_bytes
from llmtrain.storage.hub import ping
from llmtrain.storage.urls import is_url

OLDEST_TORCH = (2, 11)

_TEST_BYTES = 64 << 20


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    name: str
    state: Literal["ok", "note", "problem"]
    """A note affects only some runs."""
    found: str
    hint: str | None = None


def run_checks(config: RunConfig | None = None, run: Path | None = None) -> Iterator[Check]:
    """Check everything a run needs, or the machine alone without a `config`."""
    train = config.train if config else TrainConfig(batch_sequences=1)
    folder = run or (Path("runs") / config.name if config else Path("runs"))
    yield _check("python", lambda: f"{platform.python_version()} on {platform.platform()}")
    yield _check("torch", _torch)
    yield (device := _check("device", lambda: _device(train.device)))
    if device.state == "ok":
        yield _check(
            "precision", lambda: resolve_precision(train.precision, resolve_device(train.device))
        )
        yield _check("memory", lambda: _memory(config, train), failure="note")
        yield _check("compile", lambda: _compile(train))
    yield _check("tokenizer", _tokenizer)
    yield _check("disk speed", lambda: _disk_speed(folder))
    yield _check("disk space", lambda: _disk_space(config, folder))
    if config is not None:
        yield _check("data", lambda: _data(config))
    yield _check("network", lambda: f"{ping(5.0)} answers", failure="note")


def _check(
    name: str, run: Callable[[], str], *, failure: Literal["note", "problem"] = "problem"
) -> Check:
    try:
        return Check(name, "ok", run())
    except (UserError, RunFailed, OSError) as error:
        hint = getattr(error, "hint", "check the path and the disk")
        return Check(name, failure, str(error), hint)


def _torch() -> str:
    version = torch.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise UserError(f"{version} is too old", hint=f"pip install 'torch>={oldest}'")
    return version


def _device(name: str) -> str:
    device = resolve_device(name)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.device_count()} × {device_name(device)}, {memory / 1e9:.1f} GB"
    return f"{device_name(device)}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _compile(train: TrainConfig) -> str:
    device = resolve_device(train.device)
    enabled, warning = resolve_compile(train.compile, device)
    if warning is not None:
        raise UserError(warning, hint="install a compiler, or --set train.compile=false")
    if not enabled:
        return f"off (train.compile: {str(train.compile).lower()})"
    started = time.perf_counter()
    try:
        torch.compile(torch.nn.functional.gelu)(torch.ones(8, device=device))
    except Exception as error:  # compilers raise errors of any type
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        hint = "--set train.compile=false trains without it"
        raise UserError(f"torch.compile failed: {reason}", hint=hint) from None
    return f"works (a first function took {time.perf_counter() - started:.1f} s)"


def _memory(config: RunConfig | None, train: TrainConfig) -> str:
    device = resolve_device(train.device)
    available = available_memory(device)
    if config is None:
        return f"{available / 1e9:,.1f} GB free"
    item = 2 if resolve_precision(train.precision, device) == "bfloat16" else 4
    usage = smallest_peak(config, Layout(1, "ddp", item, cuda=device.type == "cuda"))
    if problem := shortage(usage, available):
        raise UserError(f"{problem} (one process)", hint=LESS_MEMORY)
    return f"{available / 1e9:,.1f} GB free; one process needs about {usage.total / 1e9:,.2f} GB"


def _tokenizer() -> str:
    tokenizer, text = load_tokenizer("gpt2"), "Hello world, 1 naïve café\n"
    ids = tokenizer.encode(text)
    if ids[:2].tolist() != [15496, 995] or tokenizer.decode(ids) != text:
        raise RunFailed("gpt2 returned wrong ids", hint="reinstall llmtrain and tiktoken")
    return f"gpt2, {tokenizer.vocab_size:,} ids, from the package"


def _disk_speed(run: Path) -> str:
    folder = next(path for path in (run, *run.absolute().parents) if path.is_dir())
    content = os.urandom(1 << 20)  # random, because some disks compress
    with disk_errors(folder, needed=_TEST_BYTES), tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(_TEST_BYTES // len(content)):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - started
    return f"{_TEST_BYTES / seconds / 1e6:,.0f} MB/s written and flushed in {folder.absolute()}"


def _disk_space(config: RunConfig | None, run: Path) -> str:
    free = free_bytes(run)
    if config is None:
        return f"{free / 1e9:,.1f} GB free"
    needed = disk_usage(config).largest
    if needed > free:
        raise UserError(
            f"the run needs up to {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free",
            hint="free space, choose another --run-dir, or raise checkpoint.snapshot_every",
        )
    return f"{free / 1e9:,.1f} GB free; the run needs up to {needed / 1e9:,.1f} GB"


def _data(config: RunConfig) -> str:
    folders = [config.data.path, *(each.path for each in config.data.mix)]
    names = ", ".join(folders)
    if any(map(is_url, folders)):
        return f"{names}: not checked, because it is downloaded when the run begins"
    for folder in folders:
        if not Path(folder).is_dir():
            hint = f"llmtrain prepare SOURCE --out {shlex.quote(folder)}"
            raise UserError(f"{folder} does not exist", hint=hint)
    data = open_training_data(config.data)
    if data.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the vocabulary of {data.folder} has {data.vocab_size:,} ids ({data.tokenizer}), "
            f"the model's {config.model.vocab_size:,}",
            hint=f"--set model.vocab_size={data.vocab_size}",
        )
    train, val = len(data.train_tokens()), data.tokens("val")
    return f"{names}: {train:,} training and {val:,} validation tokens, {data.tokenizer}"
