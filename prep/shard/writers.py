"""Shard writers, one per container: they append the tile runs of images, page-aligned.

The same calls always write the same bytes: no time stamps are stored, and padding is zero.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol

import h5py
import numpy as np
from h5py import h5d, h5f, h5g, h5p, h5s, h5t
from numpy.typing import NDArray

from loader.errors import ShardsError
from loader.format.layout import CHANNELS, HR, PAGE, plane_group
from loader.system.safefile import open_exclusive

Pixels = NDArray[np.uint8]


class ShardWriter(Protocol):
    """Writer of one shard: a context manager, on whose exit the file is complete and on the disk."""

    def write(self, level: int, name: str, height: int, width: int, tiles: Pixels) -> int:
        """Append the tiles (rows, cols, T, T, 3) of an image in a plane; return the offset of their run in bytes."""

    def __enter__(self) -> "ShardWriter": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_writer(container: str, path: Path, scales: tuple[int, ...], smallest_run: int) -> ShardWriter:
    """Return a writer for a new shard.

    Args:
        container: "hdf5" or "raw".
        path: where nothing exists yet.
        scales: the scales of LR planes.
        smallest_run: bytes of the smallest tile; HDF5 aligns objects of that size or more to pages.
    """
    if container == "raw":
        return RawWriter(path)
    return HDF5Writer(path, scales, smallest_run)


class RawWriter:
    """Writer of a flat file: tile runs, each starting on a page, with zeros between."""

    def __init__(self, path: Path) -> None:
        self._file = os.fdopen(open_exclusive(path), "wb")

    def write(self, level: int, name: str, height: int, width: int, tiles: Pixels) -> int:
        """See ShardWriter. Names and sizes are not stored."""
        self._file.write(bytes(-self._file.tell() % PAGE))
        offset = self._file.tell()
        self._file.write(np.ascontiguousarray(tiles).data)
        return offset

    def __enter__(self) -> "RawWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())


class HDF5Writer:
    """Writer of an ordinary HDF5 file: a dataset (H, W, 3) per image and plane, chunked in tiles, without filters.

    For a fixed number of chunks, allocated early and never filled, libhdf5 keeps no chunk index: the chunks form one
    block in row-major order (HDF5 File Format Specification 4.0, "implicit" index). The writer checks that they do.
    """

    def __init__(self, path: Path, scales: tuple[int, ...], smallest_run: int) -> None:
        self._path = path
        access = h5p.create(h5p.FILE_ACCESS)
        access.set_libver_bounds(h5f.LIBVER_V110, h5f.LIBVER_V110)  # one fixed version: equal bytes everywhere
        access.set_alignment(smallest_run, PAGE)
        access.set_fclose_degree(h5f.CLOSE_STRONG)  # closing the file closes its objects
        access.set_file_locking(False, True)  # some file systems have no locks, and nobody else writes here
        # libhdf5 opens an existing file before refusing it, which has effects on a pipe or a device.
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        with _plain_errors(path):
            self._file = h5f.create(os.fsencode(path), h5f.ACC_EXCL, _untimed(h5p.FILE_CREATE), access)
            self._descriptor = os.dup(self._file.get_vfd_handle())  # refers to this file even if its name is replaced
        try:
            with _plain_errors(path):
                self._groups = {HR: self._group(plane_group(HR))}
                if scales:
                    self._group(plane_group(scales[0]).split("/")[0])
                self._groups |= {scale: self._group(plane_group(scale)) for scale in scales}
        except OSError:
            self._abandon()
            raise

    def _group(self, name: str) -> h5g.GroupID:
        return h5g.create(self._file, name.encode(), gcpl=_untimed(h5p.GROUP_CREATE))

    def write(self, level: int, name: str, height: int, width: int, tiles: Pixels) -> int:
        """See ShardWriter."""
        with _plain_errors(self._path):
            return self._write(level, name, height, width, tiles)

    def _write(self, level: int, name: str, height: int, width: int, tiles: Pixels) -> int:
        rows, cols, side = tiles.shape[:3]
        creation = _untimed(h5p.DATASET_CREATE)
        creation.set_chunk((side, side, CHANNELS))
        creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        creation.set_fill_time(h5d.FILL_TIME_NEVER)
        # Chunks may not exceed the maximum extent, so it is rounded up to whole tiles.
        space = h5s.create_simple((height, width, CHANNELS), (rows * side, cols * side, CHANNELS))
        dataset = h5d.create(self._groups[level], name.encode(), h5t.STD_U8LE, space, creation)
        for row in range(rows):
            for col in range(cols):
                dataset.write_direct_chunk((row * side, col * side, 0), tiles[row, col])
        return self._run(dataset, rows, cols, side)

    def _run(self, dataset: h5d.DatasetID, rows: int, cols: int, side: int) -> int:
        chunks: list[h5d.StoreInfo] = []
        dataset.chunk_iter(chunks.append)
        chunks.sort(key=lambda chunk: chunk.chunk_offset)
        size = side * side * CHANNELS
        first = int(chunks[0].byte_offset)
        found = [(chunk.byte_offset, chunk.size) for chunk in chunks]
        if first % PAGE or found != [(first + i * size, size) for i in range(rows * cols)]:
            raise ShardsError(
                f"{self._path}: {h5py.h5i.get_name(dataset).decode()}: expected {rows * cols} chunks of {size} bytes "
                f"in one page-aligned run, got another layout from byte {first} on (HDF5 "
                f"{h5py.version.hdf5_version})"
            )
        return first

    def __enter__(self) -> "HDF5Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with _plain_errors(self._path):
                    self._file.close()
                    os.fsync(self._descriptor)
        finally:
            self._abandon()

    def _abandon(self) -> None:
        """Close everything still open."""
        with contextlib.suppress(OSError, RuntimeError):
            if self._file:
                # On closing, libhdf5 retries its failed writes: make room for them on a full disk.
                os.ftruncate(self._descriptor, 0)
                self._file.close()
        os.close(self._descriptor)


@contextlib.contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """Raise libhdf5's errors, a page of its variables, as the system error behind them."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        number = re.search(r"errno = (\d+)", str(error))
        code = int(number[1]) if number else getattr(error, "errno", None) or errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from None


def _untimed(kind: h5p.PropClassID) -> h5p.PropInstanceID:
    """Return creation properties without time stamps."""
    properties = h5p.create(kind)
    properties.set_obj_track_times(False)
    return properties
