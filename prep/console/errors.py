"""Errors of commands as messages instead of tracebacks."""

from collections.abc import Iterator
from contextlib import contextmanager

import click

from loader.errors import ShardsError, one_line


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Turn this project's errors, and errors about files, into click's: one message and exit code 1."""
    try:
        yield
    except ShardsError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        if error.filename is None:  # not about a file, but about a stream
            raise
        raise click.ClickException(one_line(f"{error.filename}: {error.strerror}")) from error
