"""Engine for a Ray cluster: `llmtrain prepare --engine ray`.

The worker of a task reads its partition, so files must be on a shared disk or behind a URL. Tokens
return in order, a megabyte of text at a time. Ray restarts a task if its worker dies.
"""

import logging
import os
import signal
import socket
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

from llmtrain.data.encode import Engine, ResultT, Task
from llmtrain.errors import RunFailed, UserError

_RETRIES = 5
_TASKS_PER_CPU = 2
"""Tasks running or queued per CPU: enough to keep it busy, few enough to bound stored results."""


@contextmanager
def connect_ray(address: str | None) -> Iterator[Engine]:
    """Connect to the cluster at `address` or RAY_ADDRESS; without either, start a local one."""
    try:
        import ray
    except ImportError:
        raise UserError("Ray is not installed", hint="pip install 'llmtrain[ray]'") from None
    if ray.is_initialized():
        yield partial(_run_on_ray, ray)
        return
    address = address or os.environ.get("RAY_ADDRESS")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _check_port(address)
        level = logging.ERROR
        ray.init(address, log_to_driver=False, include_dashboard=False, logging_level=level)
    except (OSError, ValueError, RuntimeError) as error:
        failure = f"cannot be reached at {address}" if address else "cannot be started here"
        raise UserError(
            f"a Ray cluster {failure}: {error}",
            hint="start one (ray start --head), or omit --ray-address to start one here",
        ) from error
    signal.signal(signal.SIGTERM, handler)  # Ray installs its own handler
    try:
        yield partial(_run_on_ray, ray)
    finally:
        ray.shutdown()


def _check_port(address: str | None) -> None:
    """Raise an OSError if nothing listens at `address`: Ray itself would kill this process."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=10).close()


def run_task(task: Task[ResultT]) -> Iterator[ResultT]:
    """Run a task on a worker."""
    yield from task()


def _run_on_ray(ray: Any, tasks: Iterable[Task[ResultT]]) -> Generator[ResultT, None, None]:
    waiting = iter(tasks)
    remote = ray.remote(num_cpus=1, num_returns="streaming", max_retries=_RETRIES)(run_task)
    running: deque[Any] = deque()
    try:
        while True:
            room = _TASKS_PER_CPU * int(ray.cluster_resources().get("CPU", 1)) - len(running)
            running.extend(remote.remote(task) for task in islice(waiting, max(room, 0)))
            if not running:
                return
            for reference in running[0]:
                yield ray.get(reference)
            running.popleft()
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise RunFailed(
            f"the Ray cluster failed: {str(error).splitlines()[0]}",
            hint="check its logs; the same command resumes after the last finished shard",
        ) from error
    finally:
        for each in running:
            ray.cancel(each)
