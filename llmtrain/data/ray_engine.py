"""The engine that sends partitions to a Ray cluster: `llmtrain prepare --engine ray`.

Why Ray: placing tasks, starting them again when a worker dies and moving the results is all done
there. A task is one partition, read where it runs (files must be reachable from there: a shared disk
or a URL); its tokens come back a megabyte of text at a time and in order, so this process writes the
same bytes as without a cluster.

    with on_ray("auto") as engine: batches = engine(encode_partition, tasks)
"""

import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from llmtrain.data.encode import Engine, Result, Task
from llmtrain.errors import RunFailed, UserError

_RETRIES = 5
"""Times that a task is started again because its worker died."""

_TASKS_PER_CPU = 2
"""Tasks at work or waiting for each CPU: enough that none idles, few enough results to hold."""


@contextmanager
def on_ray(address: str | None) -> Iterator[Engine]:
    """Connect to the cluster at `address`; without one to that of RAY_ADDRESS, else start one here.

    Raises:
        UserError: Ray is not installed, or there is no cluster at `address`.
    """
    ray = _imported()
    if ray.is_initialized():
        yield _RayEngine(ray)
        return
    address = address or os.environ.get("RAY_ADDRESS")
    heard = signal.getsignal(signal.SIGTERM)
    try:
        _knock(address)
        ray.init(
            address=address, log_to_driver=False, include_dashboard=False, logging_level="error"
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster can be {f'reached at {address}' if address else 'started here'} "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})",
            hint="start one (ray start --head), or leave --ray-address out to start one for this command",
        ) from error
    signal.signal(signal.SIGTERM, heard)  # Ray puts its own handler in place
    try:
        yield _RayEngine(ray)
    finally:
        ray.shutdown()


def _knock(address: str | None) -> None:
    """Ray ends the whole process where nobody answers; so find out before."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=10).close()


def _imported() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError("Ray is not installed", hint="pip install 'llmtrain[ray]'") from None
    return ray


class _RayEngine:
    """See `Engine`."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    def __call__(
        self, function: Callable[[Task], Iterator[Result]], tasks: Iterable[Task]
    ) -> Generator[Result, None, None]:
        """The results of all tasks, one after the other.

        Raises:
            UserError: what a task raised.
            RunFailed: a worker died again and again, or the cluster is gone.
        """
        ray, waiting = self._ray, iter(tasks)
        remote = ray.remote(num_cpus=1, num_returns="streaming", max_retries=_RETRIES)(function)
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
                hint="look at its logs; the same command goes on after the last finished shard",
            ) from error
        finally:
            for each in running:
                ray.cancel(each)
