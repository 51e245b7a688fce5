"""What the benchmarks share: the machine in a line, large images made of small ones, rounds of fair timing."""

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from prep.images.decode import read_image
from prep.images.find import find_images

Pixels = NDArray[np.uint8]


def machine() -> str:
    """The processor, its cores, memory and the system, in a line."""
    model = platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}"


def versions() -> str:
    """Python and the libraries that read, as far as they are installed."""
    names = ("numpy", "torch", "opencv-python-headless", "h5py", "lmdb", "zarr", "tensorstore", "ffcv")
    found = [f"Python {platform.python_version()}"]
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def mosaic(photographs: list[Pixels], height: int, width: int, seed: int) -> Pixels:
    """An image (height, width, 3) of photographs side by side, in an order drawn from the seed."""
    rng = np.random.default_rng(seed)
    out = np.empty((height, width, 3), np.uint8)
    top = 0
    while top < height:
        left, tall = 0, min(photograph.shape[0] for photograph in photographs)
        while left < width:
            piece = photographs[rng.integers(len(photographs))][: height - top, : width - left]
            piece = piece[:tall]
            out[top : top + tall, left : left + piece.shape[1]] = piece
            left += piece.shape[1]
        top += tall
    return out


def make_mosaics(source: Path, out: Path, count: int, height: int = 1356, width: int = 2040) -> None:
    """Write `count` images of DIV2K's size as PNG, made of the photographs in a folder; those there are kept."""
    photographs = [read_image(file.path) for file in find_images([source])]
    out.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = out / f"{number:04d}.png"
        if not path.exists():
            cv2.imwrite(str(path), mosaic(photographs, height, width, number)[..., ::-1])


def seconds_of(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rounds(works: Mapping[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Seconds of each work in each of `count` rounds; all run in each round, since machines speed up and slow down."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(count):
        for name, work in works.items():
            times[name].append(seconds_of(work))
    return times


def median_ratio(above: list[float], below: list[float]) -> float:
    """The median over rounds of a / b."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its columns aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)
