"""The checkpoint files of a run: written atomically; the newest few and the best are kept."""

import io
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from loader.system.safefile import read_member, write_atomically
from model.checkpoints import CheckpointError, read_raw

NUMBERED = re.compile(r"iteration-([0-9]+)\.pt")
LAST, BEST = "last.pt", "best.pt"


def save(path: Path, content: Mapping[str, Any], keep: int) -> None:
    """Write a checkpoint, link last.pt to it, and remove all but the `keep` newest; safe to kill at any point.

    Checkpoints of later iterations do not count towards `keep`: the run resumed before them because they are damaged.
    """
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.part"):  # left by a killed process
        with suppress(OSError):
            left.unlink(missing_ok=True)
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    write_atomically(path, buffer.getvalue())
    link_as(path, LAST)
    for old in [one for one in numbered_checkpoints(folder) if iteration_of(one) <= iteration_of(path)][keep:]:
        old.unlink(missing_ok=True)


def link_as(path: Path, name: str) -> None:
    """Give a checkpoint a second name in its folder: a hard link, or a copy if the file system has none."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")  # unguessable, so nobody can have planted a link there
    try:
        os.link(path, temporary, follow_symlinks=False)
    except OSError:
        write_atomically(path.with_name(name), read_member(path, path.stat().st_size))
        return
    try:
        temporary.replace(path.with_name(name))
    finally:  # rename does nothing if both names are links to one file
        temporary.unlink(missing_ok=True)


def checkpoint_name(iteration: int) -> str:
    """Return the file name of the checkpoint of an iteration."""
    return f"iteration-{iteration:08d}.pt"


def iteration_of(path: Path) -> int:
    """Return the iteration in a checkpoint's file name; -1 for other names."""
    match = NUMBERED.fullmatch(path.name)
    return int(match[1]) if match else -1


def numbered_checkpoints(folder: Path) -> list[Path]:
    """Return the numbered checkpoints of a folder, newest first."""
    found = [path for path in folder.glob("iteration-*.pt") if iteration_of(path) >= 0]
    return sorted(found, key=lambda path: (iteration_of(path), path.name), reverse=True)


def has_checkpoints(folder: Path) -> bool:
    """True if a folder holds checkpoints, damaged or not."""
    return bool(numbered_checkpoints(folder)) or (folder / LAST).exists()


def read_newest(folder: Path) -> tuple[Path, Mapping[str, Any], list[str]] | None:
    """Return path and content of the newest undamaged checkpoint, and the errors of newer ones; None if there is none.

    Raises CheckpointError if all are damaged.
    """
    errors: list[str] = []
    for path in [*numbered_checkpoints(folder), folder / LAST]:
        try:
            return path, read_raw(path), errors
        except CheckpointError as error:
            if path.exists():
                errors.append(str(error))
    if errors:
        raise CheckpointError("; ".join(errors))
    return None
