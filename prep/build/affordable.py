"""How many workers a build can have, once it is known that there is room for its shards."""

import contextlib
from collections.abc import Callable, Sequence

from loader.system.threads import in_threads
from prep.build.memory import Load, fitting_workers, load_memory
from prep.build.space import Sizes, need_space
from prep.images.decode import read_size
from prep.images.faults import ImageError, reading
from prep.images.find import ImageFile
from prep.images.pair import HEADER_THREADS
from prep.shard.shard import ShardPlan


def affordable_workers(plans: Sequence[ShardPlan], workers: int, note: Callable[[str], None]) -> int:
    """Return how many workers there is memory for, once it is known that there is room for the shards.

    Raises:
        ShardsError: there is no room, or no memory for one worker.
        StorageError: the storage of the sources fails.
    """
    recipe = plans[0].recipe
    looks = list(in_threads(_look, plans, HEADER_THREADS))
    need_space(plans[0].folder, [sizes for sizes, _ in looks], recipe)
    loads = [load for _, loads in looks for load in loads]
    largest = max(loads, default=Load(0, 0), key=lambda load: load_memory(load, recipe))
    wanted = min(workers, len(plans))
    fitting = fitting_workers(wanted, largest, recipe)
    if fitting < wanted:
        note(f"memory for {fitting} of {wanted} workers: the largest image has {largest.pixels / 1e6:.1f} megapixels")
    return fitting


def _look(plan: ShardPlan) -> tuple[Sizes, list[Load]]:
    """The sizes and loads of a shard's images; not of those whose headers cannot be read: they will not be stored."""
    sizes, loads = [], []
    for source in plan.sources:
        with contextlib.suppress(ImageError):
            height, width = read_size(source.image.path, plan.recipe.max_pixels, source.image.folder)
            files = [_length(file) for file in source.files]
            sizes.append((height, width))
            loads.append(Load(height * width, max(files)))
    return sizes, loads


def _length(file: ImageFile) -> int:
    with reading(file.path, file.folder):
        return file.path.stat().st_size
