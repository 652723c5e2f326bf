"""The first signal is remembered, the second acts, and the handlers of before come back."""

import os
import signal

import pytest

from llmtrain.runtime.signals import Interrupt, Interrupted


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]
)
def test_the_first_signal_waits_for_a_check(number: int, code: int) -> None:
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        interrupt.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted) as caught:
            interrupt.check()
        assert caught.value.exit_code == code
    assert signal.getsignal(number) is before


def test_the_second_one_leaves_at_once() -> None:
    with Interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_another_process_heard_first_may_still_come() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Interrupted), Interrupt(agree=lambda code: 143) as interrupt:
            interrupt.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_end_of_the_time_is_like_a_signal() -> None:
    with Interrupt(max_seconds=1000) as interrupt:
        interrupt.check()
    with Interrupt(max_seconds=0) as interrupt, pytest.raises(Interrupted) as caught:
        interrupt.check()
    assert caught.value.exit_code == 124


def test_a_signal_that_also_took_the_terminal_away_waits_as_well() -> None:
    """`pretrain 2>&1 | tee log` and Ctrl-C: nobody reads what the handler says."""
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
