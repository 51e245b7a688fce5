"""FFCV, if installed: raw images, HR crops only, since it cannot crop two images at the same position."""

import importlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from crops import Task
from reading import Pixels, Start, Way, image_pixels

from loader import ImageDataset


class Images:
    """HR images as FFCV's writer requests them: one tuple each."""

    def __init__(self, images: dict[int, ImageDataset]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images[max(self._images)])

    def __getitem__(self, number: int) -> tuple[Pixels]:
        return (np.ascontiguousarray(image_pixels(self._images, 1, number)),)


def write_ffcv(images: dict[int, ImageDataset], folder: Path) -> None:
    """Write a .beton file of raw HR images."""
    writer: Any = importlib.import_module("ffcv.writer")
    fields: Any = importlib.import_module("ffcv.fields")
    source = Images(images)
    page = 1 << max(23, (max(source[i][0].nbytes for i in range(len(source))) - 1).bit_length())
    columns = {"hr": fields.RGBImageField(write_mode="raw")}
    writer.DatasetWriter(str(folder / "hr.beton"), columns, page_size=page, num_workers=1).from_indexed_dataset(source)


def open_ffcv(task: Task) -> Start:
    """Read with FFCV's loader, the same images in the same order; it draws the positions of crops itself."""
    ffcv: Any = importlib.import_module("ffcv.loader")
    decoders: Any = importlib.import_module("ffcv.fields.decoders")
    index, crops, side = task.dataset().shards.index, task.crops(), task.sides[1]
    # Crops are specified as a fraction of the area, and resized to the size that they already have.
    share = side * side / int(index.height[0] * index.width[0])
    decoder = decoders.RandomResizedCropRGBImageDecoder((side, side), scale=(share, share), ratio=(1.0, 1.0))
    loader = ffcv.Loader(
        str(task.folder / "ffcv" / "hr.beton"),
        batch_size=task.batch_size,
        num_workers=len(task.cores) if task.cores else -1,
        os_cache=True,
        order=ffcv.OrderOption.SEQUENTIAL,
        indices=crops.image.astype(np.uint64),
        pipelines={"hr": [decoder]},
        drop_last=False,
    )

    # FFCV compiles its code at the first run: trigger that now, on one image.
    order = loader.traversal_order
    every, order.indices = order.indices, np.full(task.batch_size, crops.image[-1], np.uint64)
    deque(loader, maxlen=0)
    order.indices = every

    def start(endless: bool) -> Iterator[int]:
        while True:
            for (batch,) in loader:
                yield len(batch)
            if not endless:
                return

    return start


FFCV = Way(
    "FFCV raw (HR only)",
    "ffcv",
    open_ffcv,
    "RGBImageField(write_mode='raw'), RandomResizedCropRGBImageDecoder with the share of the area that makes a crop of "
    "the right size, os_cache=True, a worker per core; the same images in the same order, but places of its own, and "
    "no LR: it cannot crop two images alike. It is credited with whole patches",
    write_ffcv,
)
