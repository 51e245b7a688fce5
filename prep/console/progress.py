"""Progress of long commands: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress

import click
from tqdm import tqdm

from prep.console.unix import tell

LINE_EVERY = 10.0  # seconds


class Bar(tqdm):  # type: ignore[misc]
    """The progress bar of every command; without tqdm's monitor thread."""

    monitor_interval = 0


class Progress:
    """Reports on stderr how many of `total` are done; a context manager around the job.

    A closed terminal or a full device does not stop the job.

    Args:
        total: how many there are; None if unknown.
        unit: what is counted, in the singular.
        keep: leave the finished bar on the terminal.
        clock: returns seconds.
    """

    def __init__(
        self, total: int | None, unit: str, *, keep: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._unit, self._clock = total, unit, clock
        self._bar: Bar | None = None
        if sys.stderr is not None and sys.stderr.isatty():
            with suppress(OSError):
                self._bar = Bar(total=total, unit=unit, leave=keep, file=sys.stderr)
        self._start = self._last = clock()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()

    def __call__(self, done: int) -> None:
        """Report the number done so far."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.update(done - self._bar.n)
            return
        now = self._clock()
        if now - self._last >= LINE_EVERY:
            self._last = now
            tell(self._line(done, now - self._start))

    def print(self, line: str) -> None:
        """Print a line on standard output, above the bar."""
        with self._above_bar():
            click.echo(line)

    def note(self, text: str) -> None:
        """Print a message on stderr, above the bar."""
        with self._above_bar():
            tell(text)

    def _above_bar(self) -> AbstractContextManager[None]:
        if self._bar is None:
            return nullcontext()
        context: AbstractContextManager[None] = Bar.external_write_mode(self._bar.fp)
        return context

    def _line(self, done: int, seconds: float) -> str:
        rate = done / seconds if seconds else 0.0
        of_total = "" if self._total is None else f"/{self._total}"
        line = f"{done}{of_total} {self._unit}s, {seconds:.0f} s, {rate:.1f} {self._unit}s/s"
        if self._total is None:
            return line
        return f"{line}, {f'{(self._total - done) / rate:.0f} s left' if rate else 'no estimate yet'}"
