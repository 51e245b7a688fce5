"""Checks of output paths, made before the slow part of a command."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from loader.errors import ShardsError, one_line
from loader.system.safefile import open_exclusive


def check_output(path: Path, inputs: Iterable[Path]) -> None:
    """Check that a file can be written to `path`, outside all inputs, and create its folder.

    Raises:
        ShardsError: `path` is an input, is inside an input folder, or is not a regular file.
        OSError: its folder cannot be created or written to.
    """
    _check_outside(path, inputs)
    if path.exists() and not path.is_file():
        raise ShardsError(one_line(f"{path}: expected a regular file or a new path, got a folder or a device"))
    _check_writable(path.parent)


def check_output_folder(folder: Path, inputs: Iterable[Path]) -> None:
    """Check that files can be written to `folder`, outside all inputs, and create it.

    Raises:
        ShardsError: `folder` is an input or is inside one.
        OSError: it cannot be created or written to.
    """
    _check_outside(folder, inputs)
    _check_writable(folder)


def _check_outside(path: Path, inputs: Iterable[Path]) -> None:
    resolved = path.resolve()
    for source in inputs:
        if resolved == source.resolve() or (source.is_dir() and resolved.is_relative_to(source.resolve())):
            raise ShardsError(one_line(f"{path}: expected a path outside the input {source}, got one in it"))


def _check_writable(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    trial = folder / f".{secrets.token_hex(8)}.part"
    try:
        os.close(open_exclusive(trial))
        trial.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
