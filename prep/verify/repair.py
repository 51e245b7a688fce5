"""Rebuilding damaged shards from their sources; the result is kept only if it matches the index to the byte."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from loader.errors import ShardsError
from loader.format.layout import Index, shard_number
from loader.system.safefile import sync_folder
from prep.shard.shard import ShardPlan, build_shard
from prep.verify.sources import SourceImages, recipe_of

REPAIR_FOLDER = "repair.part"


@contextmanager
def repair_folder(folder: Path) -> Iterator[Path]:
    """Make a folder to build shards in, inside the dataset's so that they can be renamed, and remove it afterwards.

    Leftovers of a killed repair are removed first; the caller's lock ensures that there is one repair at a time. Only
    this user can write to the folder.

    Raises:
        OSError: it cannot be created.
    """
    workspace = folder / REPAIR_FOLDER
    with contextlib.suppress(OSError):  # a file or a link; a folder is removed next
        workspace.unlink()
    shutil.rmtree(workspace, ignore_errors=True)
    workspace.mkdir(0o700)
    try:
        yield workspace
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def repair_shard(
    folder: Path, workspace: Path, index: Index, number: int, sources: SourceImages, tick: Callable[[], None]
) -> None:
    """Rebuild one shard, and rename it over the damaged one once it is known to match the index.

    Args:
        folder: of the dataset.
        workspace: the folder to build in.
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
    serial = shard_number(shard.file)
    assert serial is not None, shard.file  # the index was checked
    plan = ShardPlan(serial, shard_sources, recipe_of(index), workspace)

    def proceed(good: bool) -> bool:
        tick()
        return good

    try:
        record = build_shard(plan, proceed)
        if record.bad:
            raise ShardsError(record.bad[0].reason)
        if record.shard != shard:
            got = record.shard.sha256 if record.shard else "no image"
            raise ShardsError(f"rebuilt from its sources: expected sha256 {shard.sha256}, got {got}")
        plan.part.replace(folder / shard.file)
        sync_folder(folder)
    except OSError as error:
        raise ShardsError(f"it could not be written: {error.strerror or error}") from None
