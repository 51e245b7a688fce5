"""How much data files hold: a sparse file can claim any length."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from loader.system.safefile import open_member

EXTENTS = 1 << 20  # how many extents are examined at most


def stored_bytes(folder: Path, start: str, enough: int) -> int:
    """Return the bytes of data in a folder's files whose names begin with `start`; stop counting at `enough`.

    Only regular files count, and no links out of the folder.
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
    """Return the bytes of a file outside holes, or more than `enough`.

    Allocated blocks (`st_blocks`) are no substitute: file systems report them late, compressed, or not at all. Without
    support for holes, the whole file counts as data.
    """
    length, at, found = os.fstat(descriptor).st_size, 0, 0
    for _ in looks:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
            stop = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            return found if error.errno == errno.ENXIO else found + length - at  # ENXIO: only a hole is left
        found, at = found + stop - start, stop
        if found >= enough or at >= length:
            break
    return found
