"""Commands that behave like other Unix tools: closed and broken streams, full devices, one-line errors.

While a command runs, a failing write to standard output raises `_OutputError`, which is not mistaken for a file's
error, and a failing write to standard error is ignored. Streams replaced by others (pytest, a notebook) stay as they
are.
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
NO_THREAD = "can't start new thread"  # from Python's RuntimeError


class _OutputError(Exception):
    """Standard output cannot be written to: its reader is gone or its device is full.

    A signal to `UnixCommand`, not an error for callers: handlers of OSError and ShardsError must not catch it.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output: {error.strerror}")
        self.errno = error.errno


def open_standard_streams() -> None:
    """Open /dev/null on closed descriptors from 0 to 2, so that no file of ours gets such a number."""
    for number in STANDARD_STREAMS:
        try:
            os.fstat(number)
        except OSError:
            # open takes the lowest free number; those below `number` are open by now.
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            os.set_inheritable(number, True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # Not by number: an import may have opened a file under it in the meantime.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123


def tell(text: str) -> None:
    """Print a line on standard error; ignore a closed pipe or a full device."""
    with suppress(OSError):
        click.echo(text, err=True)


class UnixCommand(click.Command):
    """A command that dies of SIGPIPE when its reader is gone, and exits with a one-line error when a device is full."""

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
                tell(f"Error: out of memory ({error})" if str(error) else "Error: out of memory")
                raise SystemExit(1) from None
            except RuntimeError as error:
                if NO_THREAD not in str(error):
                    raise
                tell("Error: cannot start another thread (see ulimit -u and -v)")
                raise SystemExit(1) from None


class UnixGroup(UnixCommand, click.Group):
    """A group whose commands all behave like `UnixCommand`."""


class _Output(io.FileIO):
    """Standard output: the first error raises _OutputError; later writes are dropped."""

    _broken = False

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        if self._broken or not data:  # click probes a stream with an empty write, which /dev/full refuses too
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except OSError as error:
            self._broken = True
            raise _OutputError(error) from None


class _Errors(io.FileIO):
    """Standard error: failing writes are dropped."""

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        with suppress(OSError):
            return super().write(data)
        return memoryview(data).nbytes


@contextmanager
def _unix_streams() -> Iterator[None]:
    """Replace the process's own streams as this module says, and restore them afterwards."""
    before = sys.stdout, sys.stderr
    sys.stdout = _wrapped(before[0], 1, _Output)
    sys.stderr = _wrapped(before[1], 2, _Errors)
    try:
        yield
    finally:
        with suppress(_OutputError):
            sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _wrapped(stream: TextIO, number: int, kind: type[io.FileIO]) -> TextIO:
    try:
        if not isinstance(stream, io.TextIOWrapper) or stream.fileno() != number:
            return stream
    except (OSError, ValueError):  # it has no descriptor
        return stream
    with suppress(OSError):
        stream.flush()
    raw = kind(number, "w", closefd=False)
    buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        encoding=stream.encoding,
        errors="backslashreplace",  # names that the locale cannot print
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _die_of_sigpipe() -> None:
    """End silently, as the Linux kernel ends a program that writes to a pipe without readers."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPIPE})
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)
    raise SystemExit(128 + signal.SIGPIPE)
