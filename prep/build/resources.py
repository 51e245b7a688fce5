"""The resources of a build: space for its shards, memory for its workers."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loader.system.threads import in_threads
from prep.build.memory import Load, fitting_workers, load_memory
from prep.build.space import check_space
from prep.images.decode import read_size
from prep.images.faults import ImageError, reading
from prep.images.find import ImageFile
from prep.images.pair import HEADER_THREADS
from prep.plan.dataset import DatasetPlan, ShardPlan


def affordable_workers(
    plan: DatasetPlan, shards: Sequence[ShardPlan], workers: int, note: Callable[[str], None]
) -> int:
    """Check that there is space for the shards that remain to be built; return how many workers fit into memory.

    Raises:
        ShardsError: there is too little space, or too little memory for one worker.
        StorageError: the storage of the sources fails.
    """
    recipe = plan.recipe
    images = list(in_threads(lambda shard: _measure(shard, recipe.max_pixels), shards, HEADER_THREADS))
    check_space(plan.folder, [[(image.height, image.width) for image in shard] for shard in images], recipe)
    loads = [Load(pixels=image.height * image.width, file=image.file) for shard in images for image in shard]
    largest = max(loads, default=Load(pixels=0, file=0), key=lambda load: load_memory(load, recipe))
    wanted = min(workers, len(shards))
    fitting = fitting_workers(wanted, largest, recipe)
    if fitting < wanted:
        note(f"memory for {fitting} of {wanted} workers: the largest image has {largest.pixels / 1e6:.1f} megapixels")
    return fitting


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """Height and width of an image in pixels, and the bytes of its largest file."""

    height: int
    width: int
    file: int


def _measure(shard: ShardPlan, max_pixels: int) -> list[_Measured]:
    """Return the sizes of a shard's images, except those with unreadable headers: they will not be stored."""
    images = []
    for source in shard.sources:
        with contextlib.suppress(ImageError):
            height, width = read_size(source.image.path, max_pixels, source.image.folder)
            largest = max(_length(file) for file in source.files.values())
            images.append(_Measured(height=height, width=width, file=largest))
    return images


def _length(file: ImageFile) -> int:
    with reading(file.path, file.folder):
        return file.path.stat().st_size
