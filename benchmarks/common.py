"""Shared by the benchmarks: a description of the machine, mosaics of photographs, timing in rounds."""

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
    """Return processor, cores, memory and system as one line."""
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
    """Return the versions of Python and of the installed reading libraries."""
    names = ("numpy", "torch", "opencv-python-headless", "h5py", "lmdb", "zarr", "tensorstore", "ffcv")
    found = [f"Python {platform.python_version()}"]
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def mosaic(photographs: list[Pixels], height: int, width: int, seed: int) -> Pixels:
    """Return a mosaic (height, width, 3) of photographs, in an order drawn from the seed."""
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
    """Write `count` mosaics of DIV2K's size as PNG, from the photographs in a folder; keep existing ones."""
    photographs = [read_image(file.path) for file in find_images([source])]
    out.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = out / f"{number:04d}.png"
        if not path.exists():
            cv2.imwrite(str(path), mosaic(photographs, height, width, number)[..., ::-1])


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rounds(works: Mapping[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Return the seconds of each task in `count` rounds, each running all tasks, since machines vary in speed."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(count):
        for name, work in works.items():
            times[name].append(seconds_of(work))
    return times


def median_ratio(above: list[float], below: list[float]) -> float:
    """Return the median over rounds of a / b."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)
