"""How many processes may each hold an image at once, so that the kernel never has to kill one for its memory."""

from dataclasses import dataclass
from pathlib import Path

from loader.errors import ShardsError
from loader.system.free_memory import available_memory
from loader.system.limits import PER_THREAD, address_space
from prep.plan.recipe import Recipe

PROCESS = 160 << 20  # bytes: a worker before its first image
# Bytes for each pixel of the image in work, at their peak: pixels as decoded and as RGB, tiles, LR; its file besides.
PER_PIXEL = {"matlab-uint8": 20, "matlab-double": 72}


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one image is for memory: its pixels, and the bytes of its largest file."""

    pixels: int
    file: int


def load_memory(load: Load, recipe: Recipe) -> int:
    """Return the bytes that an image in work takes at its peak."""
    return load.pixels * PER_PIXEL["matlab-uint8" if recipe.given_lr else recipe.resize] + load.file


def fitting_workers(workers: int, largest: Load, recipe: Recipe, root: Path = Path("/")) -> int:
    """Return as many workers as asked for, or fewer: those whose memory, with images of that load, is there.

    Args:
        workers: wanted.
        largest: the image that takes most.
        recipe: says how LR is made.
        root: where /proc and /sys are.

    Raises:
        ShardsError: not even one fits.
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
