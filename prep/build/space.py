"""Disk space: what the shards of a build need at most, and what is free."""

import os
from collections.abc import Iterable
from pathlib import Path

from loader.errors import ShardsError
from loader.format.layout import PAGE, run_length
from prep.plan.recipe import Recipe

Sizes = list[tuple[int, int]]  # (height, width) of the images of a shard
FILE = 8192  # bytes: upper bound of an HDF5 shard without its planes
PLANE = 1024  # bytes: upper bound of HDF5's metadata for one plane of one image; also of its part of index and record


def shard_bytes(sizes: Sizes, recipe: Recipe) -> int:
    """Return an upper bound of the bytes of a shard with images of these sizes, and its part of index and record."""
    hdf5 = recipe.container == "hdf5"
    total = FILE
    for height, width in sizes:
        for level, tile in recipe.tiles.items():
            run = run_length(height // level, width // level, tile)
            total += -(-run // PAGE) * PAGE + PLANE * (2 if hdf5 else 1)
    return total


def check_space(folder: Path, shards: Iterable[Sizes], recipe: Recipe) -> None:
    """Check that shards with images of these sizes fit on the folder's file system.

    Quotas are ignored: there is no portable way to query them.

    Raises:
        ShardsError: they do not fit; the message says how much is needed, free, and missing.
    """
    needed = sum(shard_bytes(sizes, recipe) for sizes in shards)
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if found.f_blocks and free < needed:  # some file systems report 0 for everything
        raise ShardsError(
            f"{folder}: expected {_mb(needed)} of free space for the shards to be built, got {_mb(free)}; "
            f"{_mb(needed - free + 99_999)} more needed"
        )


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
