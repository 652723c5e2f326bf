"""The worker processes of a run: start them, and print the log and each error once.

`launch` or torchrun starts the workers; both use torch's elastic launcher. Rank 0 prints the log.
The first worker that fails on a machine prints its error.
Only `launch` imports torch, because every command calls the other functions when it starts.

Why not only torchrun: `llmtrain pretrain --nproc 2` should return the run's exit code and print one
error, not the launcher's report. Why not torch's `record`: it adds a traceback to that report.
"""

import os
import signal
import sys
import time
import uuid
from pathlib import Path
from threading import Thread

from llmtrain.errors import RunFailed
from llmtrain.runtime.hardware import available_cores

LAUNCHER = "LLMTRAIN_LAUNCHER"
"""Environment variable with the process number of our own launcher."""

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_WORKER_VARIABLES = (*RANK_VARIABLES, "MASTER_ADDR", "MASTER_PORT")
_SECONDS_TO_SAVE = 600
"""Time that stopped workers have before the launcher kills them."""
_SECONDS_TO_REPORT = 20
"""Time that the worker which prints the error has before the others exit."""


def is_worker() -> bool:
    """Return whether torchrun or another launcher with its variables started this process."""
    return all(name in os.environ for name in _WORKER_VARIABLES)


def rank() -> int:
    """Return the global rank of this process; 0 for a process alone."""
    return int(os.environ["RANK"]) if is_worker() else 0


def has_restarts() -> bool:
    """Return whether the launcher restarts all workers when one of them fails."""
    return is_worker() and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def silence_other_ranks() -> None:
    """Discard standard output and error on all ranks but 0; `reports_error` undoes it."""
    if rank() > 0:
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  (until the process ends)


def let_threads_sleep() -> None:
    """Let compute threads sleep soon while they wait for each other; call it before torch loads.

    Why not OpenMP's default, 300,000 turns: if another process uses the core of one thread, the
    others spin until it runs again. Next to two busy processes on two cores, the demo then trained
    at 4,000 to 9,000 tokens/s instead of 18,000. Alone it trains as fast as with the default, and
    a tenth faster than without any spinning.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def reports_error() -> bool:
    """Return True in the first worker of this machine that fails, which prints its error.

    The first one creates a file in the launcher's folder of error files. The others block until the
    launcher stops them, because it would stop the first one if another exited earlier.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if is_worker() and error_file:
        try:
            (Path(error_file).parents[1] / "reported").touch(exist_ok=False)
        except FileExistsError:
            time.sleep(_SECONDS_TO_REPORT)
            return False
        except OSError:  # without the folder, a repeated error is better than none
            pass
    if rank() > 0 and sys.__stderr__ is not None:
        sys.stderr = sys.__stderr__
    return True


def worker_exit_code(code: int) -> int:
    """Return the exit code of a process that was interrupted with `code`.

    Ranks other than 0 exit with 0, because the launcher would stop rank 0 before it has printed.
    With restarts, rank 0 does too, because the launcher would restart an interrupted run.
    """
    if not is_worker() or _launcher_is_gone():
        return code
    return 0 if rank() > 0 or (has_restarts() and code > 2) else code


def stop_with_launcher() -> None:
    """Send SIGTERM to this process when our own launcher ends, for example by SIGKILL.

    Why not PR_SET_PDEATHSIG: Linux then sends a signal for each thread of the launcher, and the
    second SIGTERM ends the process without saving.
    """
    if LAUNCHER in os.environ:
        Thread(target=_watch_launcher, name="launcher", daemon=True).start()


def _watch_launcher() -> None:
    while not _launcher_is_gone():
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _launcher_is_gone() -> bool:
    parent = str(os.getppid())
    return os.environ.get(LAUNCHER, parent) != parent


def launch(arguments: list[str], processes: int) -> int:
    """Run `llmtrain ARGUMENTS` in several processes; return 0 or the code of the first failure."""
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # the launcher's own reports
    # More threads than cores would slow each other down.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(available_cores() // processes, 1)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SECONDS_TO_SAVE))
    os.environ[LAUNCHER] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGUSR1",
    )
    try:
        elastic_launch(config, sys.executable)("-m", "llmtrain", *arguments)
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            # The launcher itself sends SIGTERM.
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
                name = signal.Signals(-failure.exitcode).name
                raise RunFailed(
                    f"process {rank} of {processes} was killed by {name}",
                    hint="check the memory; the same command resumes from the newest checkpoint",
                ) from error
        code = int(error.get_first_failure()[1].exitcode)
        return 128 - code if code < 0 else code
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0
