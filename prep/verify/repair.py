"""Bad shards built again from their sources: kept only if they are, to the byte, what the index records."""

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
from prep.verify.sources import Originals, recipe_of
from prep.workspace.workspace import Workspace


@contextmanager
def workshop(folder: Path) -> Iterator[Path]:
    """A folder to build shards in, within that of the dataset, so that they can be renamed; gone afterwards.

    What a repair that was killed left there is removed first: the caller sees to it that there is one at a time. Only
    this user can put anything into it.

    Raises:
        OSError: it cannot be made.
    """
    place = Workspace(folder).repair
    with contextlib.suppress(OSError):  # a folder: removed next; or nothing
        place.unlink()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(0o700)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def repair_shard(
    folder: Path, place: Path, index: Index, number: int, originals: Originals, tick: Callable[[], None]
) -> None:
    """Build one shard again, and put it in the place of the bad one by rename once it is known to be right.

    Args:
        folder: of the dataset.
        place: the folder to build in.
        index: the dataset's.
        number: of the shard.
        originals: where the sources are.
        tick: is called after every image; what it raises ends the work.

    Raises:
        ShardsError: it cannot be built as it was, and why; the bad shard is then as before.
    """
    shard = index.shards[number]
    if not originals.has_all(index):
        raise ShardsError("its LR was given: --lr names the folder")
    sources = tuple(originals.source(index, int(image)) for image in np.flatnonzero(index.shard == number))
    path = place / shard.file

    def proceed(good: bool) -> bool:
        tick()
        return good

    try:
        record = build_shard(ShardPlan(shard.file, sources), recipe_of(index), path, proceed)
        if record.skipped:
            raise ShardsError(record.skipped[0].reason)
        if record.shard != shard:
            got = record.shard.sha256 if record.shard else "no image"
            raise ShardsError(f"built again from its sources: expected sha256 {shard.sha256}, got {got}")
        path.replace(folder / shard.file)
        sync_folder(folder)
    except OSError as error:
        raise ShardsError(f"it could not be written: {error.strerror or error}") from None
