"""Shards as open files: positional reads, and letting go of their pages."""

import os
import threading
from pathlib import Path

from loader.format import FormatError, Index
from loader.index import check_current
from loader.ranges import Ranges
from loader.tiles import Pixels


def open_shard(folder: Path, index: Index, number: int) -> int:
    """A descriptor of a shard's file, once it is known to have the length recorded, and to be of this index still.

    Raises:
        FormatError: it has not, or is not, or cannot be opened.
    """
    shard = index.shards[number]
    path = folder / shard.file
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise FormatError(f"{path}: expected a file that can be read, got {error.strerror}") from None
    if (size := os.fstat(descriptor).st_size) != shard.bytes:
        os.close(descriptor)
        raise FormatError(f"{path}: length: expected {shard.bytes} bytes, got {size}")
    try:
        # A build removes the old index before it touches the old shards: with the index still there, this is its shard.
        check_current(folder, index)
    except FormatError:
        os.close(descriptor)
        raise
    return descriptor


class Files:
    """The shards' files, each opened when it is first read."""

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder, self._index = folder, index
        self._descriptors: dict[int, int] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def descriptor(self, shard: int) -> int:
        """An open descriptor of a shard."""
        with self._opening:
            if shard not in self._descriptors:
                self._descriptors[shard] = open_shard(self._folder, self._index, shard)
            return self._descriptors[shard]

    def read(self, shard: int, start: int, out: Pixels) -> None:
        """Fill `out` with the bytes of a shard from `start` on.

        Raises:
            FormatError: the file cannot be read, or ends too early.
        """
        descriptor, done, view = self.descriptor(shard), 0, memoryview(out)  # type: ignore[arg-type]
        while done < len(view):
            try:
                got = os.preadv(descriptor, [view[done:]], start + done)
            except OSError as error:
                got, reason = 0, error.strerror
            else:
                reason = f"its end at {start + done}"
            if not got:
                path = self._folder / self._index.shards[shard].file
                raise FormatError(f"{path}: expected bytes {start} to {start + len(view)}, got {reason}")
            done += got

    def drop(self, ranges: Ranges) -> None:
        """Let the kernel forget pages."""
        for shard, start, stop in zip(*(column.tolist() for column in vars(ranges).values()), strict=True):
            os.posix_fadvise(self.descriptor(shard), start, stop - start, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close them all."""
        with self._opening:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()
