"""How many processes may each hold an image at once, so that the kernel never has to kill one for its memory."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from loader.format import ShardsError
from prep.limits import PER_THREAD, address_space
from prep.shard import Recipe

PROCESS = 160 << 20  # bytes: a worker before its first image
# Bytes for each pixel of the image in work, at their peak: pixels as decoded and as RGB, tiles, LR; its file besides.
PER_PIXEL = {"matlab-uint8": 20, "matlab-double": 72}
SLACK = 1 << 60  # cgroups without a limit show none, or one larger than any machine


class Load(NamedTuple):
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
    file = f" in a file of {largest.file / 1e6:,.0f} MB" * (largest.file > largest.pixels * PER_PIXEL["matlab-uint8"])
    what = f"the largest image, of {largest.pixels / 1e6:,.1f} megapixels{file}"
    space = address_space()
    if space is not None and image + PER_THREAD > space:
        needed = (image + PER_THREAD) / 1e6
        raise ShardsError(
            f"expected {needed:,.0f} MB of address space for {what}, got {space / 1e6:,.0f} MB left (ulimit -v)"
        )
    free = available(root)
    if free is None or workers * each <= free:
        return workers
    if each > free:
        raise ShardsError(f"expected {each / 1e6:,.0f} MB of memory for {what}, got {free / 1e6:,.0f} MB")
    return free // each


def available(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process and its children may still take: the machine's, or its cgroups' if less.

    Pages of files count as free, since they are dropped on demand. None: the system does not tell.
    """
    return min([*_machine(root), *_cgroups(root)], default=None)


def _machine(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _cgroups(root: Path) -> Iterator[int]:
    """What is left of each limit on the way up from this process's group (cgroups, versions 1 and 2)."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, inner = line.split(":", 2)
        if controllers == "":
            top, limit, used, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            limit, used, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        group = top / inner.strip("/")
        for place in (group, *group.parents):
            numbers = [line for name in (limit, used) for line in _lines(place / name)]
            if len(numbers) == 2 and all(number.isdigit() for number in numbers) and int(numbers[0]) < SLACK:
                stat = dict(line.split() for line in _lines(place / "memory.stat"))
                files = sum(int(stat.get(f"{cache}{kind}_file", 0)) for kind in ("active", "inactive"))
                yield max(int(numbers[0]) - int(numbers[1]) + files, 0)
            if place == top:
                break


def _lines(path: Path) -> list[str]:
    try:
        return os.fsdecode(path.read_bytes()).splitlines()
    except OSError:
        return []
