"""The process group: connections after restarts, and connections that fail."""

import os

import pytest
import torch
from worlds import in_processes

from llmtrain.errors import RunFailed
from llmtrain.runtime.distributed import init_distributed

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def join_after_restarts() -> list[float]:
    """Join on two machines, one of which counts a restart."""
    os.environ |= {
        "TORCHELASTIC_MAX_RESTARTS": "2",
        "TORCHELASTIC_RESTART_COUNT": os.environ["RANK"],
    }
    with init_distributed(CPU, spread=False) as (world, _):
        return world.sums([1.0])


def test_machines_with_different_restart_counts_connect() -> None:
    assert in_processes(2, join_after_restarts, machines=2) == [[2.0], [2.0]]


def join_unreachable(patience: float) -> str:
    import llmtrain.runtime.distributed as module

    module._SECONDS_UNTIL_STOPPED = patience
    os.environ |= {"GLOO_SOCKET_IFNAME": "no-such-card", "TORCHELASTIC_RUN_ID": "ours"}
    try:
        with init_distributed(CPU, spread=False):
            return "joined"
    except RunFailed as error:
        return str(error)


def test_a_failed_connection_is_reported_under_a_launcher() -> None:
    assert all("no-such-card" in output for output in in_processes(2, join_unreachable, 0.1))
