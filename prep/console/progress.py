"""How far a long job is: a bar on a terminal, now and then a plain line elsewhere."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress

from tqdm import tqdm

from prep.console.unix import tell

LINE_EVERY = 10.0  # seconds


class _Bar(tqdm):  # type: ignore[misc]
    """A bar that needs no thread of its own."""

    monitor_interval = 0


class Progress:
    """Tells a person on stderr how many of `total` are done; a context manager around the job.

    A terminal that went away, or a full device, does not stop the job.
    """

    def __init__(self, total: int, unit: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._unit, self._clock = total, unit, clock
        terminal = sys.stderr is not None and sys.stderr.isatty()
        with suppress(OSError):
            self._bar = _Bar(total=total, unit=unit, disable=not terminal)
        self._start = self._last = clock()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._bar.close()

    def __call__(self, done: int) -> None:
        """Report the number done so far."""
        with suppress(OSError):
            self._bar.update(done - self._bar.n)
        now = self._clock()
        if self._bar.disable and now - self._last >= LINE_EVERY:
            self._last = now
            seconds = now - self._start
            rate = done / seconds
            left = f"{(self._total - done) / rate:.0f} s left" if done else "no estimate yet"
            tell(f"{done}/{self._total} {self._unit}s, {seconds:.0f} s, {rate:.1f} {self._unit}s/s, {left}")
