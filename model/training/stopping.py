"""Signals that ask a run to end: it saves, and ends well."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Slurm and other schedulers send SIGTERM, or what one tells them to, before they kill; a person sends SIGINT.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether a run is to end: `signal` is the name of the signal that came, or what else asks for it; or None."""

    signal: str | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def ask(self, why: str) -> None:
        """Ask a run to end, unless it is asked already."""
        self.signal = self.signal or why


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
