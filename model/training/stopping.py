"""Signals that stop a run: it saves a checkpoint and exits with code 0."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Slurm and other schedulers send SIGTERM, or a signal of one's choice, before they kill; Ctrl-C sends SIGINT.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether a run should stop. `signal` is the name of the signal received, another reason, or None."""

    signal: str | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def ask(self, why: str) -> None:
        """Request a stop, unless one is requested already."""
        self.signal = self.signal or why


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Turn signals into a stop request while the block runs; a second SIGINT raises KeyboardInterrupt."""
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request.signal == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number).name

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
