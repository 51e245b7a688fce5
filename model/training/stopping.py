"""Signals that ask a run to end: it saves, and ends well."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Slurm and other schedulers send SIGTERM, or what one tells them to, before they kill; a person sends SIGINT.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether a signal came: `signal` is its name, or None."""

    signal: str | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Note signals in place of ending at once; a second SIGINT interrupts as it does elsewhere."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.signal == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
