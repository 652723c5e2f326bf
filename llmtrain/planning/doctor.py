"""Is this machine, and this folder, fit for a run: looked at before the first hour of it is spent.

Why: a wrong torch, a disk that is slow or too small and data of another tokenizer all show themselves late.
Everything is tried, not looked up: text is encoded, a file is written and flushed, code is compiled.

    for check in check_up(load_config(Path("gpt2-small.yaml"))): print(check.name, check.state, check.found)
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
from llmtrain.data.mixture import open_training_data, train_tokens
from llmtrain.errors import RunFailed, UserError
from llmtrain.model.tokenizer import load_tokenizer
from llmtrain.planning.sizes import disk_usage
from llmtrain.runtime.device import device_name, resolve_compile, resolve_device, resolve_precision
from llmtrain.storage.disk import disk_errors, free_bytes
from llmtrain.storage.hub import ping
from llmtrain.storage.urls import is_url

OLDEST_TORCH = (2, 11)

_WRITTEN = 64 << 20
"""Bytes written to measure a disk."""

_PATIENCE = 5.0
"""Seconds for the hub to answer."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: Literal["ok", "note", "problem"]
    """note: not needed for every run."""
    found: str
    hint: str | None = None


def check_up(config: RunConfig | None = None, run: Path | None = None) -> Iterator[Check]:
    """Look at everything a run needs, one after the other.

    Args:
        config: the run's; None: that of no run in particular.
        run: its folder; None: by its name under runs/.
    """
    train = config.train if config else TrainConfig(batch_sequences=1)
    place = run or (Path("runs") / config.name if config else Path("runs"))
    yield _look("python", lambda: f"{platform.python_version()} on {platform.platform()}")
    yield _look("torch", _torch)
    device = _look("device", lambda: _device(train.device))
    yield device
    if device.state == "ok":
        yield _look(
            "precision", lambda: resolve_precision(train.precision, resolve_device(train.device))
        )
        yield _look("compile", lambda: _compile(train))
    yield _look("tokenizer", _tokenizer)
    yield _look("disk speed", lambda: _disk_speed(place))
    yield _look("disk space", lambda: _disk_space(config, place))
    if config is not None:
        yield _look("data", lambda: _data(config))
    yield _look("network", lambda: f"{ping(_PATIENCE)} answers", otherwise="note")


def _look(
    name: str, found: Callable[[], str], *, otherwise: Literal["note", "problem"] = "problem"
) -> Check:
    try:
        return Check(name, "ok", found())
    except (UserError, RunFailed) as error:
        return Check(name, otherwise, str(error), error.hint)
    except OSError as error:  # of a disk that refuses in a way of its own
        return Check(name, otherwise, str(error), "is the path right, and the disk sound?")


def _torch() -> str:
    version = torch.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise UserError(
            f"{version} is older than {oldest}, the oldest that llmtrain runs on",
            hint=f"pip install 'torch>={oldest}'",
        )
    return version


def _device(name: str) -> str:
    device = resolve_device(name)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.device_count()} × {device_name(device)}, {memory / 1e9:.1f} GB"
    return f"{device_name(device)}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _compile(train: TrainConfig) -> str:
    device = resolve_device(train.device)
    wanted, warning = resolve_compile(train.compile, device)
    if warning is not None:
        raise UserError(warning, hint="install a compiler, or --set train.compile=false")
    if not wanted:
        return f"off (train.compile: {str(train.compile).lower()})"
    started = time.perf_counter()
    try:
        torch.compile(torch.nn.functional.gelu)(torch.ones(8, device=device))
    except Exception as error:  # whatever the compilers of this machine throw
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"torch.compile fails here: {reason}", hint="--set train.compile=false trains without"
        ) from None
    return f"works (a first function took {time.perf_counter() - started:.1f} s)"


def _tokenizer() -> str:
    tokenizer, text = load_tokenizer("gpt2"), "Hello world, 1 naïve café\n"
    ids = tokenizer.encode(text)
    if ids[:2].tolist() != [15496, 995] or tokenizer.decode(ids) != text:
        raise RunFailed(
            "gpt2 gives other ids than it should", hint="install llmtrain and tiktoken again"
        )
    return f"gpt2, {tokenizer.vocab_size:,} ids, from the package"


def _disk_speed(place: Path) -> str:
    folder = next(path for path in (place, *place.absolute().parents) if path.is_dir())
    content = os.urandom(1 << 20)  # a disk that compresses must not look faster than it is
    with disk_errors(folder, needed=_WRITTEN), tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(_WRITTEN // len(content)):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - started
    return f"{_WRITTEN / seconds / 1e6:,.0f} MB/s written and flushed in {folder.absolute()}"


def _disk_space(config: RunConfig | None, place: Path) -> str:
    free = free_bytes(place)
    if config is None:
        return f"{free / 1e9:,.1f} GB free"
    needed = disk_usage(config).largest
    if needed > free:
        raise UserError(
            f"the run needs {needed / 1e9:,.1f} GB at its fullest and {free / 1e9:,.1f} GB are free",
            hint="make room, write elsewhere (--run-dir), or raise checkpoint.snapshot_every",
        )
    return f"{free / 1e9:,.1f} GB free, {needed / 1e9:,.1f} GB needed at the run's fullest"


def _data(config: RunConfig) -> str:
    folders = [config.data.path, *(each.path for each in config.data.mix)]
    if any(is_url(folder) for folder in folders):
        return f"{', '.join(folders)}: not looked at, as it is copied here when the run begins"
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(
                f"there is no {folder}", hint=f"llmtrain prepare SOURCE --out {shlex.quote(folder)}"
            )
    data = open_training_data(config.data)
    if data.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{data.folder} has a vocabulary of {data.vocab_size:,} ({data.tokenizer}), "
            f"the model one of {config.model.vocab_size:,}",
            hint=f"--set model.vocab_size={data.vocab_size}",
        )
    train, val = len(train_tokens(data)), data.tokens("val")
    return f"{', '.join(folders)}: {train:,} tokens to train on and {val:,} to validate, {data.tokenizer}"
