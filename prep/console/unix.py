"""Commands that behave as other Unix tools do: closed and broken streams, full devices, errors in one line.

While a command runs, writes to standard output raise `_OutputError`, which nothing mistakes for trouble with a file,
and writes to standard error never fail. Streams that somebody else put in place (pytest, a notebook) are left alone.
"""

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import click

STANDARD_STREAMS = (0, 1, 2)
NO_THREAD = "can't start new thread"  # what Python says


class _OutputError(Exception):
    """Standard output takes no more: its reader is gone or its device is full.

    A signal to `UnixCommand`, not an error for callers: handlers of OSError and ShardsError must not catch it.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output: {error.strerror}")
        self.errno = error.errno


def open_standard_streams() -> None:
    """Open /dev/null on those of descriptors 0 to 2 that are closed, before a file of ours gets such a number."""
    for number in STANDARD_STREAMS:
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken: those below `number` are open by now.
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            os.set_inheritable(number, True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # Not by its number: what an import opened may have got that in the meantime.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123


def tell(text: str) -> None:
    """Print a line on standard error; a reader who is gone, or a full device, is no reason to stop."""
    with suppress(OSError):
        click.echo(text, err=True)


class UnixCommand(click.Command):
    """A command that dies of SIGPIPE when its reader is gone, and ends with one line when its device is full."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command; see click.Command.main."""
        open_standard_streams()
        with _unix_streams():
            try:
                try:
                    result = super().main(*args, **kwargs)
                except SystemExit:
                    sys.stdout.flush()
                    raise
                sys.stdout.flush()
                return result
            except _OutputError as error:
                if error.errno == errno.EPIPE:
                    _die_of_sigpipe()
                tell(f"Error: {error}")
                raise SystemExit(1) from None
            except MemoryError as error:
                tell(f"Error: expected enough memory, got none left{f' ({error})' * bool(str(error))}")
                raise SystemExit(1) from None
            except RuntimeError as error:
                if NO_THREAD not in str(error):
                    raise
                tell("Error: expected room for another thread, got none (see ulimit -u and -v)")
                raise SystemExit(1) from None


class UnixGroup(UnixCommand, click.Group):
    """A group of commands that behaves as `UnixCommand`, for all of them."""


class _Output(io.FileIO):
    """Standard output: the first error is raised as _OutputError, and what comes later is dropped."""

    _broken = False

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        if self._broken or not data:  # click tries a stream with no bytes at all, which /dev/full refuses too
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except OSError as error:
            self._broken = True
            raise _OutputError(error) from None


class _Errors(io.FileIO):
    """Standard error: what cannot be written is dropped."""

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        with suppress(OSError):
            return super().write(data)
        return memoryview(data).nbytes


@contextmanager
def _unix_streams() -> Iterator[None]:
    """The process's own streams, written to as this module says; afterwards they are as they were."""
    before = sys.stdout, sys.stderr
    sys.stdout = _rewired(before[0], 1, _Output)
    sys.stderr = _rewired(before[1], 2, _Errors)
    try:
        yield
    finally:
        with suppress(_OutputError):
            sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _rewired(stream: TextIO, number: int, kind: type[io.FileIO]) -> TextIO:
    try:
        if not isinstance(stream, io.TextIOWrapper) or stream.fileno() != number:
            return stream
    except (OSError, ValueError):  # there is no descriptor behind it
        return stream
    with suppress(OSError):
        stream.flush()
    raw = kind(number, "w", closefd=False)
    buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        encoding=stream.encoding,
        errors="backslashreplace",  # a name that the locale cannot print is no reason to stop
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _die_of_sigpipe() -> None:
    """End as the kernel ends a program that writes to a pipe without readers: silently."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPIPE})
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)
    raise SystemExit(128 + signal.SIGPIPE)
