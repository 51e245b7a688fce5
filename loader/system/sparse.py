"""How much data there really is in files, which may claim any length: holes take no room on a disk."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from loader.system.safefile import open_member

EXTENTS = 1 << 20  # stretches of data that are looked at, at most


def stored_bytes(folder: Path, start: str, enough: int) -> int:
    """Return the bytes of data in the files of a folder whose names begin with `start`; counting ends at `enough`.

    What is no regular file of this folder does not count.
    """
    found, looks = 0, iter(range(EXTENTS))
    for path in sorted(path for path in folder.iterdir() if path.name.startswith(start)):
        try:
            descriptor = open_member(path)
        except OSError:
            continue
        try:
            found += _data(descriptor, enough - found, looks)
        finally:
            os.close(descriptor)
        if found >= enough:
            break
    return found


def _data(descriptor: int, enough: int, looks: Iterator[int]) -> int:
    """The bytes of a file outside of holes, as far as its file system tells, or more than `enough` of them.

    Allocated blocks (`st_blocks`) would not do: file systems report them late, compressed, or not at all. One that
    knows nothing of holes takes the whole file for data.
    """
    length, at, found = os.fstat(descriptor).st_size, 0, 0
    for _ in looks:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
            stop = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            return found if error.errno == errno.ENXIO else found + length - at  # ENXIO: there is only a hole left
        found, at = found + stop - start, stop
        if found >= enough or at >= length:
            break
    return found
