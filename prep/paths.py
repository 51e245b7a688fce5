"""Paths as arguments of commands: an empty one is refused, since it would mean the working directory."""

import os
from pathlib import Path
from typing import Any

import click


class GivenPath(click.Path):
    """A path on the command line, as `pathlib.Path`; `"$UNSET"`, which leaves an empty one, is a usage error."""

    def __init__(self, *, exists: bool = False) -> None:
        super().__init__(exists=exists, path_type=Path)

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; see click.ParamType.convert."""
        if os.fspath(value) == "":
            self.fail("expected a path, got an empty one (a shell variable that is not set?)", param, ctx)
        return super().convert(value, param, ctx)
