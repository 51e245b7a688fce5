"""Copy a dataset to where it is read faster, a node's own disk, say: `python -m loader.stage DIR TARGET`.

Copies the index, the shards that it names, the sidecars that belong to it, and skipped.json; nothing else in the
folder, and no link out of it.
"""

import argparse
import os
import platform
import shutil
import sys
from pathlib import Path

from loader.errors import FormatError, ShardsError, one_line
from loader.format.index import read_index
from loader.format.layout import INDEX
from loader.format.sidecar import sidecars
from loader.system.safefile import open_exclusive, open_member

SKIPPED = "skipped.json"
_BLOCK = 1 << 20
_SPARE = 50  # a file system needs a little more than its files have bytes: this part of them


def copy_dataset(folder: Path, target: Path) -> int:
    """Copy the dataset in `folder` to `target`, a new folder for its owner alone; return the bytes copied.

    Raises:
        FormatError: `folder` holds no whole dataset, or changed meanwhile.
        ShardsError: there is no room for it.
        OSError: a file cannot be read or written, or something is at `target` already.
    """
    index = read_index(folder)
    names = [shard.file for shard in index.shards]
    names += [name for name, digest in sidecars(folder).items() if digest == index.sha256]
    if os.path.lexists(folder / SKIPPED):
        names.append(SKIPPED)
    names.append(INDEX)  # last: without it there is no dataset yet
    need = sum((folder / name).stat().st_size for name in names)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.mkdir(mode=0o700)
    try:
        room = shutil.disk_usage(target).free
        if need + need // _SPARE > room:
            raise ShardsError(f"{target}: expected room for the {need} bytes of {folder}, got {room}")
        copied = sum(_copy(folder / name, target / name) for name in names)
        if read_index(target).sha256 != index.sha256:
            raise FormatError(f"{folder}: expected a dataset that stays as it is, got another while it was copied")
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return copied


def _copy(source: Path, target: Path) -> int:
    """Copy a file of a dataset, as long as it was when it was opened; return its length."""
    with os.fdopen(open_member(source), "rb") as read, os.fdopen(open_exclusive(target), "wb") as written:
        length = left = os.fstat(read.fileno()).st_size
        while left:
            try:
                block = read.read(min(_BLOCK, left))
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(source)) from None
            if not block:
                raise FormatError(f"{source}: expected {length} bytes, got {length - left}")
            try:
                written.write(block)
                written.flush()
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(target)) from None
            left -= len(block)
    return length


def main() -> None:
    """Copy as the command line says; on failure end with one line and code 1."""
    parser = argparse.ArgumentParser(prog="python -m loader.stage", description="Copy a dataset, and nothing else.")
    parser.add_argument("folder", metavar="DIR", type=Path, help="the dataset")
    parser.add_argument("target", metavar="TARGET", type=Path, help="a folder that is not there yet")
    words = parser.parse_args()
    try:
        copy_dataset(words.folder, words.target)
    except (ShardsError, OSError, MemoryError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        sys.exit(f"{platform.node()}: {one_line(text)}")


if __name__ == "__main__":
    main()
