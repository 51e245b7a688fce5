"""Memory: how many workers can each hold an image at once without being killed for it."""

from dataclasses import dataclass
from pathlib import Path

from loader.errors import ShardsError
from loader.system.free_memory import available_memory
from loader.system.limits import PER_THREAD, address_space
from prep.plan.recipe import Recipe

PROCESS = 160 << 20  # bytes of a worker before its first image
# Peak bytes per pixel of an image being processed: as decoded and as RGB, tiles, LR; without its file.
PER_PIXEL = {"matlab-uint8": 20, "matlab-double": 72}


@dataclass(frozen=True, kw_only=True)
class Load:
    """What determines the memory an image needs: its pixels, and the bytes of its largest file."""

    pixels: int
    file: int


def load_memory(load: Load, recipe: Recipe) -> int:
    """Return the peak bytes needed to process an image."""
    return load.pixels * PER_PIXEL["matlab-uint8" if recipe.given_lr else recipe.resize] + load.file


def fitting_workers(workers: int, largest: Load, recipe: Recipe, root: Path = Path("/")) -> int:
    """Return how many workers fit into memory, at most `workers`.

    Args:
        workers: the number wanted.
        largest: the image that needs most memory.
        recipe: how LR is made.
        root: the parent of /proc and /sys.

    Raises:
        ShardsError: there is too little memory for one worker.
    """
    image = load_memory(largest, recipe)
    each = PROCESS + image
    large = largest.file > largest.pixels * PER_PIXEL["matlab-uint8"]
    file = f" in a file of {largest.file / 1e6:,.0f} MB" if large else ""
    what = f"the largest image, of {largest.pixels / 1e6:,.1f} megapixels{file}"
    space = address_space()
    if space is not None and image + PER_THREAD > space:
        needed = (image + PER_THREAD) / 1e6
        raise ShardsError(
            f"expected {needed:,.0f} MB of address space for {what}, got {space / 1e6:,.0f} MB left (ulimit -v)"
        )
    free = available_memory(root)
    if free is None or workers * each <= free:
        return workers
    if each > free:
        raise ShardsError(f"expected {each / 1e6:,.0f} MB of memory for {what}, got {free / 1e6:,.0f} MB")
    return free // each
