"""HDF5 shards as HDF5 tools see them: every plane the dataset that the index says, at the place that it says."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from h5py import h5d, h5f, h5g, h5p, h5t

from loader.format import CHANNELS, Index, plane_group, plane_name
from prep.check import Finding


def check_structure(folder: Path, index: Index, number: int) -> Iterator[Finding]:
    """Where the datasets in an HDF5 shard (names, sizes, type, chunks, place) differ from what the index says."""
    path = folder / index.shards[number].file
    try:
        access = h5p.create(h5p.FILE_ACCESS)
        access.set_fclose_degree(h5f.CLOSE_STRONG)
        access.set_file_locking(False, True)
        file = h5f.open(os.fsencode(path), h5f.ACC_RDONLY, access)
    except (OSError, RuntimeError, ValueError) as error:
        yield Finding(number, f"{path}: expected an HDF5 file, got one that cannot be opened ({_reason(error)})")
        return
    try:
        yield from _check_planes(file, path, index, number)
    finally:
        # What libhdf5 could not read it may fail to close.
        with contextlib.suppress(OSError, RuntimeError):
            file.close()


def _check_planes(file: h5f.FileID, path: Path, index: Index, number: int) -> Iterator[Finding]:
    images = np.flatnonzero(index.shard == number).tolist()
    for scale in index.planes:
        where = f"{path}: {plane_name(scale)}"
        try:
            group = h5g.open(file, plane_group(scale).encode())
            count = group.get_num_objs()
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            yield Finding(number, f"{where}: expected the group {plane_group(scale)}, got none ({_reason(error)})")
            continue
        for image in images:
            name = index.name[image]
            try:
                found = _describe(h5d.open(group, name.encode()))
            except (OSError, RuntimeError, KeyError, ValueError) as error:
                text = f"expected a dataset, got none ({_reason(error)})"
            else:
                wanted = _wanted(index, scale, image)
                if found == wanted:
                    continue
                key = next(key for key in wanted if found.get(key) != wanted[key])
                text = f"{key}: expected {wanted[key]}, got {found.get(key)}"
            yield Finding(number, f"{where} of image {name!r}: HDF5: {text}", image, scale)
        if count > len(images):
            yield Finding(number, f"{where}: expected {len(images)} datasets, got {count}")


def _wanted(index: Index, scale: int, image: int) -> dict[str, object]:
    height, width = (int(sizes[image]) for sizes in index.sizes(scale))
    tile, length = index.planes[scale].tile, int(index.run_lengths(scale)[image])
    first = int(index.planes[scale].offset[image])
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
    """The first words of what libhdf5 says, which goes on with a page of its variables."""
    return str(error).strip("'\"").split("\n")[0][:120]
