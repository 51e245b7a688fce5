"""Commands as other Unix tools behave: closed and broken streams, full devices, errors in one line."""

import contextlib
import errno
import os
import signal
import sys
from typing import Any

import click

STANDARD_STREAMS = (0, 1, 2)


def open_standard_streams() -> None:
    """Open /dev/null on those of descriptors 0 to 2 that are closed, before a file of ours gets such a number."""
    for number in STANDARD_STREAMS:
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken: those below `number` are open by now.
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            os.set_inheritable(number, True)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115


def tell(text: str) -> None:
    """Print a line on standard error; a reader who is gone, or a full device, is no reason to stop."""
    with contextlib.suppress(OSError):
        click.echo(text, err=True)


class UnixCommand(click.Command):
    """A command that ends quietly with SIGPIPE when its reader is gone, and with one line on a full device."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command; see click.Command.main."""
        open_standard_streams()
        try:
            return super().main(*args, **kwargs)
        finally:
            _flush_standard_output()

    def invoke(self, ctx: click.Context) -> Any:
        """Run the callback; errors of standard output are told from errors of files, which have names."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except OSError as error:
            if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC):
                raise
            _end_output()
            if error.errno == errno.EPIPE:
                _die_of_sigpipe()
            raise click.ClickException(f"standard output: {error.strerror}") from None


def _end_output() -> None:
    """Let nothing be written to standard output any more, at exit either."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _die_of_sigpipe() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)


def _flush_standard_output() -> None:
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _end_output()
