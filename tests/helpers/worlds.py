"""Several processes of one run without a launcher, forked from a server that has imported torch."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtrain.config.schema import RunConfig
from llmtrain.errors import UserError

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["llmtrain.training.run"])


def in_processes(
    size: int, function: Callable[..., Any], *arguments: Any, machines: int = 1
) -> list[Any]:
    """Return the results or exceptions of `function` by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = _CONTEXT.Queue()
    processes = [
        _CONTEXT.Process(
            target=_member, args=(queue, rank, size, machines, port, function, arguments)
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    return [results[rank] for rank in range(size)]


def _member(
    queue: Any,
    rank: int,
    size: int,
    machines: int,
    port: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    each = size // machines
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % each, "LOCAL_WORLD_SIZE": each}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        result = function(*arguments)
    except Exception as error:  # the test checks it
        result = error if isinstance(error, UserError) else RuntimeError(traceback.format_exc())
    queue.put((rank, result))


def train(config: RunConfig, folder: Path, options: dict[str, Any]) -> int:
    """Train as one of the processes, and return the step reached, also after an interruption."""
    from llmtrain.runtime.signals import Interrupted
    from llmtrain.storage.run_folder import RunFolder, step_folders
    from llmtrain.training.run import pretrain

    try:
        return pretrain(config, folder, log=lambda line: None, **options).step
    except Interrupted:
        return max(step_folders(RunFolder(folder).states))


def train_together(
    size: int, config: RunConfig, folder: Path, machines: int = 1, **options: Any
) -> None:
    """Train or resume a run with `size` processes."""
    for result in in_processes(size, train, config, folder, options, machines=machines):
        if isinstance(result, Exception):
            raise result
