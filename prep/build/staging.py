"""The names that a build gives to files in its folder, and how they get there: staged first, then renamed."""

import re
import stat
from pathlib import Path

from loader.errors import ShardsError
from loader.system.safefile import describe_kind, sync_folder, write_staged
from prep.shard.shard import PART

BUILD = "build.json"
SKIPPED = "skipped.json"
RECORD = ".json"  # the ending of a record
SHARD = re.compile(r"shard-\d{5,}\.(h5|raw)")
LEFTOVER = re.compile(rf"{SHARD.pattern}(\.json|\.part|\.json\.part)|build\.json|(build|skipped|index)\.json\.part")


def stage(path: Path, data: bytes) -> Path:
    """Write a file to the disk under its temporary name, which is returned."""
    part = path.with_name(path.name + PART)
    write_staged(part, data)
    return part


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that its name never stands for less than all of it."""
    stage(path, data).rename(path)
    sync_folder(path.parent)


def exists(path: Path) -> bool:
    """Whether there is anything of that name, be it a link that leads nowhere."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def need_file_or_nothing(path: Path) -> None:
    """Hold that a name can be replaced or removed as a file is.

    Raises:
        ShardsError: it is a folder's.
    """
    if exists(path) and stat.S_ISDIR(mode := path.lstat().st_mode):
        raise ShardsError(f"{path}: expected a file or nothing, got {describe_kind(mode)}")
