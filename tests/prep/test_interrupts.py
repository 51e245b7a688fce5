"""Interrupts of long jobs: none is lost, wherever it arrives."""

import os
import signal
from collections.abc import Callable

import pytest

from prep.console.interrupts import SIGNALS, interruptible


class Signals:
    """Sends its own process a signal when it is finalized."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)
        for _ in range(100):  # the handler runs between these steps
            pass


def interrupt_finalizer(number: int) -> None:
    with interruptible() as check:
        check()
        Signals(number)
        check()


def interrupt(number: int) -> None:
    with interruptible():
        os.kill(os.getpid(), number)
        signal.pause()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("job", [interrupt, interrupt_finalizer])
def test_interrupts_end_the_job(job: Callable[[int], None], number: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        job(number)


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with interruptible():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
