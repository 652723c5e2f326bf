"""Several processes of one command on this machine, started and watched by torch's elastic launcher.

Why not torchrun itself: it is the same launcher, but a person who typed one command wants its exit code
and one error, not the launcher's report of how many processes have failed.

    code = launch(["pretrain", "--config", "configs/demo.yaml"], processes=2)
"""

import logging
import os
import signal
import sys
import uuid

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from llmtrain.errors import RunFailed
from llmtrain.runtime import ranks

_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGUSR1"
"""What ends a run with its state saved; the launcher passes them on."""

_SECONDS_TO_SAVE = 600
"""How long the launcher waits for processes that were told to end before it kills them."""


def launch(arguments: list[str], processes: int) -> int:
    """Run `llmtrain ARGUMENTS` in so many processes and wait for them.

    Returns:
        The exit code of the process that ended first of those that did not succeed, or 0.

    Raises:
        RunFailed: a process was killed.
    """
    logging.disable()  # the launcher's own reports; the processes' are theirs
    # Each its share: threads of several processes on one core wait for each other.
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // processes, 1)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SECONDS_TO_SAVE))
    os.environ[ranks.LAUNCHER] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle=_SIGNALS,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "llmtrain", *arguments)
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            # The others left without a word then; those that the launcher itself ended are no reason.
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
                raise RunFailed(
                    f"process {rank} of {processes} was killed by {signal.Signals(-failure.exitcode).name}",
                    hint="was memory short? The same command goes on from the newest state",
                ) from error
        code = int(error.get_first_failure()[1].exitcode)
        return code if code >= 0 else 128 - code  # a signal that came before the process listened
    except SignalException as ended:
        return 128 + int(ended.sigval)
    return 0
