"""Does it fit? The exact sizes of tile runs, from the headers of images, against the space there is."""

import os
from collections.abc import Iterable
from pathlib import Path

from loader.errors import ShardsError
from loader.format.layout import PAGE, run_length
from prep.plan.recipe import Recipe

Sizes = list[tuple[int, int]]  # (height, width) of the images of a shard
FILE = 8192  # bytes: the most that an HDF5 shard takes besides what is counted for its planes
PLANE = 1024  # bytes: the most that HDF5's description of a plane takes; about as much as index and record do


def shard_bytes(sizes: Sizes, recipe: Recipe) -> int:
    """The most bytes that a shard of images of these sizes takes, with its lines in index and record."""
    hdf5 = recipe.container == "hdf5"
    total = FILE
    for height, width in sizes:
        for level, tile in recipe.tiles.items():
            run = run_length(height // level, width // level, tile)
            total += -(-run // PAGE) * PAGE + PLANE + PLANE * hdf5
    return total


def check_space(folder: Path, shards: Iterable[Sizes], recipe: Recipe) -> None:
    """Hold that shards of images of these sizes fit on the folder's file system.

    A quota of the user is not asked for: there is no portable way. What it refuses is reported when it does.

    Raises:
        ShardsError: they do not; it says how much is needed, there, and missing.
    """
    needed = sum(shard_bytes(sizes, recipe) for sizes in shards)
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if found.f_blocks and free < needed:  # some file systems tell nothing, and say 0
        raise ShardsError(
            f"{folder}: expected {_mb(needed)} of free space for the shards to be built, got {_mb(free)}; "
            f"{_mb(needed - free + 99_999)} are missing"
        )


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
