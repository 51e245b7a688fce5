"""Shards as open files: positional reads, and dropping pages from the page cache."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path

from loader.errors import FormatError
from loader.format.index import check_current
from loader.format.layout import Index
from loader.pixels.byte_ranges import Ranges
from loader.pixels.tiles import Pixels
from loader.system.descriptors import CROWDED, OpenFile, limit, table
from loader.system.safefile import open_member


def open_shard(folder: Path, index: Index, number: int) -> int:
    """Return a descriptor of a shard's file.

    Raises:
        FormatError: the file cannot be opened, its length differs from the index, or the dataset was rebuilt.
    """
    shard = index.shards[number]
    path = folder / shard.file
    try:
        descriptor = _with_retries(partial(open_member, path))
    except OSError as error:
        raise FormatError(f"{path}: expected a file that can be read, got {_reason(error)}") from None
    try:
        if (size := os.fstat(descriptor).st_size) != shard.bytes:
            raise FormatError(f"{path}: length: expected {shard.bytes} bytes, got {size}")
        # The next check opens a file, too. Make sure of a spare descriptor, so that a lack of one is reported as such.
        os.close(_with_retries(partial(os.dup, descriptor)))
        # A build removes the old index before it touches the old shards: if the index is there, so is its shard.
        check_current(folder, index)
    except OSError as error:
        os.close(descriptor)
        raise FormatError(f"{path}: expected a file that can be read, got {_reason(error)}") from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _with_retries(open_file: Callable[[], int]) -> int:
    """Open a file; if there are too many, close others and try again."""
    while True:
        try:
            return open_file()
        except OSError as error:
            if error.errno not in CROWDED or not table.make_room():
                raise


def _reason(error: OSError) -> str:
    if error.errno in CROWDED:
        return f"{error.strerror}: this process may have {limit()} (ulimit -n raises that limit)"
    return error.strerror or str(error)


class Files:
    """The files of a dataset's shards, each opened on first use, and again if it was closed to make room for others.

    `close`, or dropping the object, closes them.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder, self._index = folder, index
        self._open: dict[int, OpenFile] = {}

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, shard: int, start: int, out: Pixels) -> None:
        """Fill `out` with bytes of a shard, from byte `start` on.

        Raises:
            FormatError: the file cannot be read, or is too short.
        """
        done, view = 0, memoryview(out)  # type: ignore[arg-type]
        with self._use(shard) as descriptor:
            while done < len(view):
                try:
                    got = os.preadv(descriptor, [view[done:]], start + done)
                except OSError as error:
                    got, reason = 0, _reason(error)
                else:
                    reason = f"end of file at {start + done}"
                if not got:
                    path = self._folder / self._index.shards[shard].file
                    raise FormatError(f"{path}: expected bytes {start} to {start + len(view)}, got {reason}")
                done += got

    def drop(self, ranges: Ranges) -> None:
        """Advise the system to drop pages from the page cache."""
        for shard, start, stop in ranges:
            with self._use(shard) as descriptor, suppress(OSError):
                os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close all files; raise the first OSError after that."""
        failed: OSError | None = None
        while self._open:
            try:
                self._open.popitem()[1].close()
            except OSError as error:
                failed = failed or error
        if failed:
            raise failed

    def _use(self, shard: int) -> AbstractContextManager[int]:
        open_file = partial(open_shard, self._folder, self._index, shard)
        return table.use(self._open, shard, str(self._folder / self._index.shards[shard].file), open_file)
