"""Rebuilding damaged shards from their sources; the result is kept only if it matches the index to the byte."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from loader.errors import ShardsError
from loader.format.layout import Index
from loader.system.safefile import sync_folder
from prep.plan.dataset import ShardPlan
from prep.shard.shard import build_shard
from prep.verify.sources import SourceImages, recipe_of
from prep.workspace.workspace import Workspace


@contextmanager
def repair_folder(folder: Path) -> Iterator[Path]:
    """Make a folder to build shards in, inside the dataset's so that they can be renamed, and remove it afterwards.

    Leftovers of a killed repair are removed first; the caller's lock ensures that there is one repair at a time. Only
    this user can write to the folder.

    Raises:
        OSError: it cannot be created.
    """
    place = Workspace(folder).repair
    with contextlib.suppress(OSError):  # a file or a link; a folder is removed next
        place.unlink()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(0o700)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def repair_shard(
    folder: Path, place: Path, index: Index, number: int, sources: SourceImages, tick: Callable[[], None]
) -> None:
    """Rebuild one shard, and rename it over the damaged one once it is known to match the index.

    Args:
        folder: of the dataset.
        place: the folder to build in.
        index: the dataset's.
        number: of the shard.
        sources: where to find the source images.
        tick: called after every image; an exception from it stops the work.

    Raises:
        ShardsError: the shard cannot be rebuilt as it was; the damaged one is unchanged.
    """
    shard = index.shards[number]
    if not sources.covers(index):
        raise ShardsError("its LR was given: name its folder with --lr")
    shard_sources = tuple(sources.find(index, int(image)) for image in np.flatnonzero(index.shard == number))
    path = place / shard.file

    def proceed(good: bool) -> bool:
        tick()
        return good

    try:
        record = build_shard(ShardPlan(shard.file, shard_sources), recipe_of(index), path, proceed)
        if record.skipped:
            raise ShardsError(record.skipped[0].reason)
        if record.shard != shard:
            got = record.shard.sha256 if record.shard else "no image"
            raise ShardsError(f"rebuilt from its sources: expected sha256 {shard.sha256}, got {got}")
        path.replace(folder / shard.file)
        sync_folder(folder)
    except OSError as error:
        raise ShardsError(f"it could not be written: {error.strerror or error}") from None
