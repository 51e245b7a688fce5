"""Path arguments of commands. An empty path is refused: it would mean the working directory."""

import os
from pathlib import Path
from typing import Any

import click

from loader.errors import one_line


class GivenPath(click.Path):
    """A path argument, as `pathlib.Path`; an empty one (from `"$UNSET"`) is a usage error.

    Args:
        exists: refuse a path where nothing exists. One that cannot be examined (a dead mount) passes: reading it will
            report the error.
    """

    def __init__(self, *, exists: bool = False) -> None:
        super().__init__(path_type=Path)
        self._must_exist = exists

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; see click.ParamType.convert."""
        if os.fspath(value) == "":
            self.fail("expected a path, got an empty one (an unset shell variable?)", param, ctx)
        if self._must_exist:
            try:
                Path(value).stat()
            except FileNotFoundError:
                self.fail(f"Path '{one_line(os.fspath(value))}' does not exist.", param, ctx)
            except OSError:
                pass
        return super().convert(value, param, ctx)
