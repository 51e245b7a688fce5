"""Checking HDF5 shards as HDF5 tools see them: every plane must be the dataset that the index describes."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from h5py import h5d, h5f, h5g, h5l, h5p, h5t

from loader.format.layout import CHANNELS, Index, plane_group, plane_name, run_length
from loader.system.safefile import open_member
from prep.shard.checksums import Finding

# What h5py raises for libhdf5's errors; a damaged file can also make it ask for any amount of memory.
FAILURES = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError)
LINKS = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "an external link"}


def check_hdf5(folder: Path, index: Index, number: int) -> Iterator[Finding]:
    """Yield a finding for each dataset in an HDF5 shard whose name, shape, type, chunks or offset is wrong.

    Soft and external links are reported and not followed; no file but the shard is opened.
    """
    path = folder / index.shards[number].file
    try:
        descriptor = open_member(path)
    except OSError as error:
        yield Finding(number, f"{path}: expected a readable file, got {error.strerror}")
        return
    try:
        yield from check_open_hdf5(descriptor, path, index, number)
    finally:
        os.close(descriptor)


def check_open_hdf5(descriptor: int, path: Path, index: Index, number: int) -> Iterator[Finding]:
    """Check an open shard as `check_hdf5` does; findings call it `path`."""
    try:
        access = h5p.create(h5p.FILE_ACCESS)
        access.set_fclose_degree(h5f.CLOSE_STRONG)
        access.set_file_locking(False, True)
        # The open file itself, even if its name has been replaced.
        name = Path(f"/proc/self/fd/{descriptor}")
        file = h5f.open(os.fsencode(name if name.exists() else path), h5f.ACC_RDONLY, access)
    except FAILURES as error:
        yield Finding(number, f"{path}: expected an HDF5 file, got one that cannot be opened ({_reason(error)})")
        return
    try:
        yield from _check_planes(file, path, index, number)
    finally:
        # libhdf5 may fail to close what it could not read.
        with contextlib.suppress(OSError, RuntimeError):
            file.close()


def _check_planes(file: h5f.FileID, path: Path, index: Index, number: int) -> Iterator[Finding]:
    images = np.flatnonzero(index.shard == number).tolist()
    for level in index.planes:
        where = f"{path}: {plane_name(level)}"
        try:
            group = _group(file, plane_group(level))
            count = group.get_num_objs()
        except FAILURES as error:
            yield Finding(number, f"{where}: expected the group {plane_group(level)}, got none ({_reason(error)})")
            continue
        for image in images:
            name = index.name[image]
            try:
                _need_hard_link(group, name)
                found = _describe(h5d.open(group, name.encode()))
            except FAILURES as error:
                text = f"expected a dataset, got none ({_reason(error)})"
            else:
                wanted = _wanted(index, level, image)
                if found == wanted:
                    continue
                key = next(key for key in wanted if found.get(key) != wanted[key])
                text = f"{key}: expected {wanted[key]}, got {found.get(key)}"
            yield Finding(number, f"{where} of image {name!r}: HDF5: {text}", image, level)
        if count > len(images):
            yield Finding(number, f"{where}: expected {len(images)} datasets, got {count}")


def _group(file: h5f.FileID, path: str) -> h5g.GroupID:
    """Open a group name by name: libhdf5 would follow a path through links of any kind."""
    group = h5g.open(file, b"/")
    for name in path.split("/"):
        _need_hard_link(group, name)
        group = h5g.open(group, name.encode())
    return group


def _need_hard_link(group: h5g.GroupID, name: str) -> None:
    """Raise ValueError unless a name in a group is a hard link."""
    if (kind := group.links.get_info(name.encode()).type) != h5l.TYPE_HARD:
        raise ValueError(f"{LINKS.get(kind, 'a link of another kind')}, which is not followed")


def _wanted(index: Index, level: int, image: int) -> dict[str, object]:
    height, width = (int(sizes[image]) for sizes in index.sizes(level))
    tile = index.planes[level].tile
    length = run_length(height, width, tile)
    first = int(index.planes[level].offset[image])
    return {
        "shape": (height, width, CHANNELS),
        "type": "uint8",
        "chunks": (tile, tile, CHANNELS),
        "filters": 0,
        "bytes": length,
        "first chunk": first,
        "last chunk": first + length - tile * tile * CHANNELS,
    }


def _describe(dataset: h5d.DatasetID) -> dict[str, object]:
    creation = dataset.get_create_plist()
    # Ask nothing more of a virtual dataset or one with external storage: libhdf5 would open other files.
    if creation.get_layout() == h5d.VIRTUAL or creation.get_external_count():
        raise ValueError("one whose pixels are in other files")
    facts: dict[str, object] = {
        "shape": dataset.shape,
        "type": "uint8" if dataset.get_type().equal(h5t.STD_U8LE) else "another",
        "filters": creation.get_nfilters(),
        "bytes": dataset.get_storage_size(),
    }
    if creation.get_layout() != h5d.CHUNKED:
        return facts
    facts["chunks"] = creation.get_chunk()
    if count := dataset.get_num_chunks():
        facts["first chunk"] = dataset.get_chunk_info(0).byte_offset
        facts["last chunk"] = dataset.get_chunk_info(count - 1).byte_offset
    return facts


def _reason(error: Exception) -> str:
    """Return the first line of a message of libhdf5, which continues with a page of its variables."""
    return str(error).strip("'\"").split("\n")[0][:120]
