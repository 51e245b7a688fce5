"""A run's checkpoints on disk: written whole or not at all, the last few and the best kept, the newest found."""

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
    """Write a checkpoint, let last.pt be the same file, and drop all but the `keep` newest; a kill loses none.

    Checkpoints of later iterations are not counted: the run went back behind them because they are damaged.
    """
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.part"):  # of a process that was killed
        with suppress(OSError):
            left.unlink(missing_ok=True)
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    write_atomically(path, buffer.getvalue())
    link_as(path, LAST)
    for old in [one for one in numbered_checkpoints(folder) if iteration_of(one) <= iteration_of(path)][keep:]:
        old.unlink(missing_ok=True)


def link_as(path: Path, name: str) -> None:
    """Let another name in the same folder stand for a checkpoint too, by a hard link where there are such."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")  # a name that nobody can have prepared
    try:
        os.link(path, temporary, follow_symlinks=False)
    except OSError:
        write_atomically(path.with_name(name), read_member(path, path.stat().st_size))
        return
    try:
        temporary.replace(path.with_name(name))
    finally:  # rename leaves both where they are one file already
        temporary.unlink(missing_ok=True)


def checkpoint_name(iteration: int) -> str:
    """The name of the checkpoint of an iteration."""
    return f"iteration-{iteration:08d}.pt"


def iteration_of(path: Path) -> int:
    """The iteration that the name of a checkpoint says; -1 for another name."""
    match = NUMBERED.fullmatch(path.name)
    return int(match[1]) if match else -1


def numbered_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first."""
    found = [path for path in folder.glob("iteration-*.pt") if iteration_of(path) >= 0]
    return sorted(found, key=lambda path: (iteration_of(path), path.name), reverse=True)


def has_checkpoints(folder: Path) -> bool:
    """Whether a folder holds checkpoints of a run, whole or not."""
    return bool(numbered_checkpoints(folder)) or (folder / LAST).exists()


def read_newest(folder: Path) -> tuple[Path, Mapping[str, Any], list[str]] | None:
    """Read the newest whole checkpoint, with the complaints about newer ones; None where there is none at all.

    Raises CheckpointError if there are some, and none is whole.
    """
    complaints: list[str] = []
    for path in [*numbered_checkpoints(folder), folder / LAST]:
        try:
            return path, read_raw(path), complaints
        except CheckpointError as error:
            if path.exists():
                complaints.append(str(error))
    if complaints:
        raise CheckpointError("; ".join(complaints))
    return None
