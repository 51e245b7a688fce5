"""Shards as open files: positional reads, and letting go of their pages."""

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
    """A descriptor of a shard's file, once it is known to have the length recorded, and to be of this index still.

    Raises:
        FormatError: it has not, or is not, or cannot be opened.
    """
    shard = index.shards[number]
    path = folder / shard.file
    try:
        descriptor = _patiently(partial(open_member, path))
    except OSError as error:
        raise FormatError(f"{path}: expected a file that can be read, got {_reason(error)}") from None
    try:
        if (size := os.fstat(descriptor).st_size) != shard.bytes:
            raise FormatError(f"{path}: length: expected {shard.bytes} bytes, got {size}")
        # The check opens a file too. A descriptor to spare is found first, so that a lack of them has its own message.
        os.close(_patiently(partial(os.dup, descriptor)))
        # A build removes the old index before it touches the old shards: with the index still there, this is its shard.
        check_current(folder, index)
    except OSError as error:
        os.close(descriptor)
        raise FormatError(f"{path}: expected a file that can be read, got {_reason(error)}") from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _patiently(open_file: Callable[[], int]) -> int:
    """Open a file; where there are too many, make room and try again."""
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
    """The shards' files, each opened when it is first read, and again after others took its place.

    They are closed when it is dropped, or by `close`.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder, self._index = folder, index
        self._open: dict[int, OpenFile] = {}

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, shard: int, start: int, out: Pixels) -> None:
        """Fill `out` with the bytes of a shard from `start` on.

        Raises:
            FormatError: the file cannot be read, or ends too early.
        """
        done, view = 0, memoryview(out)  # type: ignore[arg-type]
        with self._use(shard) as descriptor:
            while done < len(view):
                try:
                    got = os.preadv(descriptor, [view[done:]], start + done)
                except OSError as error:
                    got, reason = 0, _reason(error)
                else:
                    reason = f"its end at {start + done}"
                if not got:
                    path = self._folder / self._index.shards[shard].file
                    raise FormatError(f"{path}: expected bytes {start} to {start + len(view)}, got {reason}")
                done += got

    def drop(self, ranges: Ranges) -> None:
        """Let the kernel forget pages, where it will."""
        for shard, start, stop in zip(*(column.tolist() for column in vars(ranges).values()), strict=True):
            with self._use(shard) as descriptor, suppress(OSError):
                os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close them all; OSError naming the first that could not be closed well."""
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
