"""Paths as arguments of commands: an empty one is refused, since it would mean the working directory."""

import os
from pathlib import Path
from typing import Any

import click

from loader.errors import one_line


class GivenPath(click.Path):
    """A path on the command line, as `pathlib.Path`; `"$UNSET"`, which leaves an empty one, is a usage error.

    Args:
        exists: there must be something; what is out of reach at the moment (a dead mount) is not absent: its reader
            tells.
    """

    def __init__(self, *, exists: bool = False) -> None:
        super().__init__(path_type=Path)
        self._must_exist = exists

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; see click.ParamType.convert."""
        if os.fspath(value) == "":
            self.fail("expected a path, got an empty one (a shell variable that is not set?)", param, ctx)
        if self._must_exist:
            try:
                Path(value).stat()
            except FileNotFoundError:
                self.fail(f"Path '{one_line(os.fspath(value))}' does not exist.", param, ctx)
            except OSError:
                pass
        return super().convert(value, param, ctx)
