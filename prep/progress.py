"""How far a long job is: a bar on a terminal, now and then a plain line elsewhere."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

LINE_EVERY = 10.0  # seconds


class Progress:
    """Tells a person on stderr how many of `total` are done; a context manager around the job."""

    def __init__(self, total: int, unit: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._unit, self._clock = total, unit, clock
        self._bar = tqdm(total=total, unit=unit, disable=not sys.stderr.isatty())
        self._start = self._last = clock()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, done: int) -> None:
        """Report the number done so far."""
        self._bar.update(done - self._bar.n)
        now = self._clock()
        if self._bar.disable and now - self._last >= LINE_EVERY:
            self._last = now
            seconds = now - self._start
            rate = done / seconds
            left = f"{(self._total - done) / rate:.0f} s left" if done else "no estimate yet"
            line = f"{done}/{self._total} {self._unit}s, {seconds:.0f} s, {rate:.1f} {self._unit}s/s, {left}"
            print(line, file=sys.stderr, flush=True)
