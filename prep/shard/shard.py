"""Building one shard: images are decoded, downscaled, cut into tiles and written, one at a time.

Its bytes depend only on the sources and the recipe, so shards can be built anywhere, in any order.
"""

import errno
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from loader.errors import one_line
from loader.format.layout import CHANNELS, HR, Shard, run_length
from loader.pixels.tiles import split
from loader.system.safefile import open_own
from prep.images.faults import ImageError, shown
from prep.plan.dataset import ShardPlan, Source
from prep.plan.recipe import Recipe
from prep.shard.planes import read_planes
from prep.shard.records import ImageRecord, Run, ShardRecord, SkippedImage, stamp_files
from prep.shard.writers import open_writer

BLOCK = 1 << 20  # bytes per read when reading a shard back


def build_shard(plan: ShardPlan, recipe: Recipe, path: Path, proceed: Callable[[bool], bool]) -> ShardRecord:
    """Write a shard to a new file at `path`, then read it back and compare checksums.

    Args:
        plan: the shard.
        recipe: how to store its images.
        path: its staged file; an existing one is removed first.
        proceed: called after each image with whether it was usable; returns whether to continue. If it stops the
            build, the file is removed, and the record lists the images skipped so far.

    Raises:
        OSError: the shard cannot be written, or reads back differently.
        StorageError: the storage of its sources fails.
        MemoryError: memory is short.

    After an error no file is left.
    """
    record = ShardRecord(shard=None, images=[], skipped=[], stamps=[])
    path.unlink(missing_ok=True)
    try:
        complete = _write(plan, recipe, path, proceed, record)
        if complete and record.images:
            return replace(record, shard=_read_back(plan, recipe, path, record.images))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    path.unlink()
    return replace(record, images=[])


def _write(plan: ShardPlan, recipe: Recipe, path: Path, proceed: Callable[[bool], bool], record: ShardRecord) -> bool:
    """Write the images and add them to `record`. Return False if `proceed` stopped the build."""
    tiles = recipe.tiles
    smallest = min(tiles.values()) ** 2 * CHANNELS
    with open_writer(recipe.container, path, recipe.scales, smallest) as writer:
        for source in plan.sources:
            record.stamps.extend(stamp_files(source))
            try:
                planes = read_planes(source, recipe)
            except ImageError as error:
                record.skipped.append(_skipped(source, error))
                if not proceed(False):
                    return False
                continue
            runs = {}
            for level, plane in planes.items():
                height, width = plane.pixels.shape[:2]
                run = split(plane.pixels, tiles[level])
                runs[level] = Run(
                    offset=writer.write(level, source.name, height, width, run),
                    crc32=zlib.crc32(run.data),
                    source=plane.source,
                    source_sha256=plane.source_sha256,
                )
            height, width = planes[HR].pixels.shape[:2]
            record.images.append(ImageRecord(name=source.name, height=height, width=width, runs=runs))
            if not proceed(True):
                return False
    return True


def _read_back(plan: ShardPlan, recipe: Recipe, path: Path, images: list[ImageRecord]) -> Shard:
    """Return length and SHA-256 of a shard just written, after comparing the checksum of every run."""
    runs = sorted(
        (run.offset, run_length(image.height // level, image.width // level, tile), run.crc32, image.name)
        for image in images
        for level, tile in recipe.tiles.items()
        for run in [image.runs[level]]
    )
    digest = hashlib.sha256()
    with os.fdopen(open_own(path), "rb") as file:
        for offset, length, expected, name in runs:
            for block in _blocks(file, offset - file.tell()):
                digest.update(block)
            crc32 = 0
            for block in _blocks(file, length):
                digest.update(block)
                crc32 = zlib.crc32(block, crc32)
            if crc32 != expected:
                raise OSError(errno.EIO, f"image {name!r} reads back differently", str(path))
        for block in _blocks(file, os.fstat(file.fileno()).st_size - file.tell()):
            digest.update(block)
        return Shard(plan.file, file.tell(), digest.hexdigest())


def _blocks(file: BinaryIO, length: int) -> Iterator[bytes]:
    """Yield the next `length` bytes of a file, or fewer at its end."""
    while length > 0 and (block := file.read(min(length, BLOCK))):
        length -= len(block)
        yield block


def _skipped(source: Source, error: ImageError) -> SkippedImage:
    """Return the record of an error, without the absolute path of the file."""
    text = str(error)
    for file in source.files.values():
        if text.startswith(where := one_line(f"{shown(file.path)}: ")):
            return SkippedImage(image=source.name, source=file.name, reason=text.removeprefix(where))
    return SkippedImage(image=source.name, source=source.image.name, reason=text)
