"""The first signal sets a flag, the second one acts, and previous handlers are restored."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.runtime.signals import Interrupt, Interrupted


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]
)
def test_first_signal_is_raised_by_check(number: int, code: int) -> None:
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        interrupt.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted) as caught:
            interrupt.check()
        assert caught.value.exit_code == code
    assert signal.getsignal(number) is before


def test_second_signal_acts_at_once() -> None:
    with Interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_signal_may_arrive_after_another_rank_received_it() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Interrupted), Interrupt(agree=lambda code: 143) as interrupt:
            interrupt.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, before)


def test_time_limit_is_like_a_signal() -> None:
    with Interrupt(max_seconds=1000) as interrupt:
        interrupt.check()
    with Interrupt(max_seconds=0) as interrupt, pytest.raises(Interrupted) as caught:
        interrupt.check()
    assert caught.value.exit_code == 124


def test_signal_with_a_closed_stderr() -> None:
    """Ctrl-C in `pretrain 2>&1 | tee log` also stops tee."""
    reader, writer = os.pipe()
    os.close(reader)
    stderr = os.dup(2)
    os.dup2(writer, 2)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Interrupted):
                interrupt.check()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(writer)


def test_a_signal_writes_nothing_to_a_file_that_has_descriptor_2(tmp_path: Path) -> None:
    script = """
import os, signal
from llmtrain.runtime.signals import Interrupt

with open("data.bin", "wb") as file, Interrupt():
    assert file.fileno() == 2
    os.kill(os.getpid(), signal.SIGTERM)
"""
    command = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, script]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0
    assert (tmp_path / "data.bin").read_bytes() == b""
