"""Images → shards: which image goes where, known before any is read; then shards, built apart; the index last.

Which bytes a shard holds follows from the sources and the recipe alone, not from the workers or their order.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loader import format as fmt
from loader.format import HR, Index, LrOrigin, Plane, ShardsError, Strings
from loader.index import dump_index
from prep import __version__
from prep.images import ImageFile, check_sizes, pair_lr
from prep.pool import build_shards
from prep.shard import PART, Recipe, ShardPlan, ShardRecord, Source

SHARD_NAME = re.compile(r"shard-\d{5,}\.(h5|raw)")
SKIPPED = "skipped.json"


def images_per_shard(count: int) -> int:
    """The default: 16 shards, for as many cores to build at once, of 8 to 64 images; or more images, for 512 shards.

    A process that reads keeps each shard open, and may often have no more than 1024 files.
    """
    return max(min(max(-(-count // 16), 8), 64), -(-count // 512))


def plan_shards(images: Sequence[ImageFile], recipe: Recipe, folder: Path, lr: Path | None = None) -> list[ShardPlan]:
    """Lay out a dataset: images in order, so many to a shard.

    Args:
        images: as `find_images` gives them.
        recipe: how they are to be stored.
        folder: the dataset's folder to be.
        lr: a folder of LR images to pack in place of making them.

    Raises:
        ShardsError: listing each LR image that is missing, left over, or of a size that does not fit.
    """
    given = {scale: pair_lr(images, lr, scale) for scale in recipe.scales} if lr else {}
    for scale, files in given.items():
        check_sizes(images, files, scale)
    sources = [Source(image, {scale: files[i] for scale, files in given.items()}) for i, image in enumerate(images)]
    step = recipe.images_per_shard
    return [
        ShardPlan(number, tuple(sources[start : start + step]), recipe, folder)
        for number, start in enumerate(range(0, len(sources), step))
    ]


@dataclass(frozen=True)
class Summary:
    """What a build made: its index, the bytes of its shards, and the images it had to leave out, with reasons."""

    index: Index
    bytes: int
    bad: list[str]


def build_dataset(
    plans: Sequence[ShardPlan], workers: int, *, skip_bad: bool, overwrite: bool, report: Callable[[int], None]
) -> Summary:
    """Build the shards of a plan and make a dataset of them.

    Args:
        plans: as `plan_shards` gives them.
        workers: processes that build shards.
        skip_bad: leave out images that cannot be used (and write which, and why, to skipped.json).
        overwrite: replace a dataset that the folder already holds, once the new one is complete.
        report: is told now and then how many images are done.

    Raises:
        ShardsError: the folder holds a dataset, images cannot be used, or the folder cannot be written. A build that
            fails leaves nothing behind, and an earlier dataset as it was.
    """
    folder, recipe = plans[0].folder, plans[0].recipe
    if (folder / fmt.INDEX).exists() and not overwrite:
        raise ShardsError(f"{folder}: expected a folder without a dataset, got {fmt.INDEX}; --overwrite replaces it")
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        discard_parts(folder)
        try:
            records = build_shards(plans, workers, skip_bad, report)
            bad = [reason for record in records for reason in record.bad]
            if bad and not skip_bad:
                raise ShardsError("\n  ".join(["expected usable images, got these (--on-error skip goes on):", *bad]))
            index = make_index(recipe, records)
            commit(folder, index, bad)
        except BaseException:
            discard_parts(folder)
            if new:
                folder.rmdir()
            raise
    except OSError as error:
        raise ShardsError(f"{error.filename or folder}: could not be written: {error.strerror or error}") from None
    return Summary(index, sum(shard.bytes for shard in index.shards), bad)


def make_index(recipe: Recipe, records: Sequence[ShardRecord]) -> Index:
    """The index of a dataset from the records of its shards, in order."""
    built = [record for record in records if record.shard]
    images = [image for record in built for image in record.images]
    if not images:
        raise ShardsError("expected at least one usable image, got none")
    origin = LrOrigin("given") if recipe.given_lr else LrOrigin("imresize", recipe.resize, recipe.border)
    planes = {}
    for scale in (HR, *recipe.scales):
        runs = [image.runs[scale] for image in images]
        named = [(run.source, run.source_sha256) for run in runs if run.source and run.source_sha256]
        planes[scale] = Plane(
            tile=fmt.plane_tile(recipe.tile, scale),
            offset=np.array([run.offset for run in runs], np.int64),
            crc32=np.array([run.crc32 for run in runs], np.int64),
            source=Strings([name for name, _ in named]) if named else None,
            source_sha256=Strings([digest for _, digest in named]) if named else None,
        )
    return Index(
        container=recipe.container,
        made_by=f"srshards {__version__}",
        lr=origin,
        shards=tuple(record.shard for record in built if record.shard),
        name=Strings([image.name for image in images]),
        shard=np.repeat(np.arange(len(built)), [len(record.images) for record in built]),
        height=np.array([image.height for image in images], np.int64),
        width=np.array([image.width for image in images], np.int64),
        planes=planes,
    )


def commit(folder: Path, index: Index, bad: Sequence[str]) -> None:
    """Turn finished parts into a dataset: shards take their names, then the index appears, by rename.

    What an earlier dataset left in the folder is removed first, its index before its shards: at no moment does an
    index stand beside shards that are not its own.
    """
    part = folder / (fmt.INDEX + PART)
    with part.open("wb") as file:
        file.write(dump_index(index))
        file.flush()
        os.fsync(file.fileno())
    (folder / fmt.INDEX).unlink(missing_ok=True)
    for path in folder.iterdir():
        if SHARD_NAME.fullmatch(path.name) or path.name == SKIPPED:
            path.unlink()
    if bad:
        (folder / SKIPPED).write_text(json.dumps(bad, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for shard in index.shards:
        (folder / (shard.file + PART)).rename(folder / shard.file)
    part.rename(folder / fmt.INDEX)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard_parts(folder: Path) -> None:
    """Remove the temporary files of a build that did not end."""
    for path in folder.glob(f"*{PART}"):
        if path.name == fmt.INDEX + PART or SHARD_NAME.fullmatch(path.name.removesuffix(PART)):
            path.unlink()
