"""Ways of reading: generators of batches, and how to make one from a function that copies a crop.

Every way fills reused batch buffers, which saves rivals one copy that training would need.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from crops import Task
from numpy.typing import NDArray

from loader import ImageDataset
from loader.stream.buffers import aligned

Pixels = NDArray[np.uint8]
Start = Callable[[bool], Iterator[int]]  # endless or once? → a generator: each item, the samples of one more batch
CopyCrop = Callable[[int, int, int, Pixels, Pixels], object]  # image, top, left (LR pixels), LR and HR to fill
ReadBatch = Callable[[range, Pixels, Pixels], object]  # samples, buffers to fill


@dataclass(frozen=True)
class Way:
    """A way of reading crops.

    name: for tables. folder: its data, within the work folder. open: opens the data. how: its setup, for the report.
    prepare: writes the folder from the dataset's images; None if it reads the shards. all_cores: it runs on all cores,
    others on one. process: ways with the same value take turns in one process, with the same buffers. environment:
    additional environment variables of that process.
    """

    name: str
    folder: str
    open: Callable[[Task], Start]
    how: str
    prepare: Callable[[dict[int, ImageDataset], Path], None] | None = None
    all_cores: bool = False
    process: str = ""
    environment: tuple[tuple[str, str], ...] = ()


@cache
def buffers(count: int, lr: int, hr: int) -> tuple[Pixels, Pixels]:
    """Return reused buffers for a batch, LR and HR, aligned to cache lines like PatchLoader's."""
    return aligned((count, lr, lr, 3)), aligned((count, hr, hr, 3))


def by_batch(task: Task, read: ReadBatch, step: int = 0) -> Start:
    """Return a way that reads `step` samples at a time (0: a batch), and continues there when restarted."""
    step = step or task.batch_size
    lr, hr = buffers(task.batch_size, *task.sides)
    place = 0

    def start(endless: bool) -> Iterator[int]:
        nonlocal place
        while True:
            stop = min(place + step, len(task.numbers))
            read(range(place, stop), lr[: stop - place], hr[: stop - place])
            count, place = stop - place, stop % len(task.numbers)
            yield count
            if not (place or endless):
                return

    return start


def by_crop(task: Task, copy: CopyCrop, step: int = 0, threads: int = 1) -> Start:
    """Return a way that copies crops one by one, or on several threads."""
    crops = task.crops()
    places = list(zip(crops.image.tolist(), crops.top.tolist(), crops.left.tolist(), strict=True))

    def read(samples: range, lr: Pixels, hr: Pixels) -> None:
        for n, to_lr, to_hr in zip(samples, lr, hr, strict=True):
            copy(*places[n], to_lr, to_hr)

    def read_together(samples: range, lr: Pixels, hr: Pixels) -> None:
        jobs = [pool.submit(copy, *places[n], lr[k], hr[k]) for k, n in enumerate(samples)]
        for job in jobs:
            job.result()

    if threads == 1:
        return by_batch(task, read, step)
    pool = ThreadPoolExecutor(threads)
    return by_batch(task, read_together, step)


def slices(task: Task, lr: list[Pixels], hr: list[Pixels]) -> CopyCrop:
    """Copies crops from sliceable arrays, one per image and plane."""
    (patch, side), scale = task.sides, task.scale

    def copy(image: int, top: int, left: int, to_lr: Pixels, to_hr: Pixels) -> None:
        y, x = top * scale, left * scale
        to_lr[:] = lr[image][top : top + patch, left : left + patch]
        to_hr[:] = hr[image][y : y + side, x : x + side]

    return copy


def image_pixels(images: dict[int, ImageDataset], scale: int, number: int) -> Pixels:
    """Return an image (h, w, 3) of a plane (1: HR) from the shards; HR is cropped to the part covered by LR."""
    pair = images[max(images) if scale == 1 else scale][number]
    pixels: Pixels = pair[1 if scale == 1 else 0].permute(1, 2, 0).numpy()
    return pixels
