"""Test images in pairs: HR read from a folder, with LR read or made by MATLAB's bicubic, or both from shards.

Images are uint8 arrays (H, W, 3), RGB. HR images whose size is no multiple of the scale are cropped at the
bottom and right, as everyone does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loader import ImageDataset
from loader.errors import ShardsError, one_line
from loader.resize.imresize import imresize
from model.metrics import Image, too_small
from prep.images.decode import read_image
from prep.images.find import find_images
from prep.images.pair import check_sizes, pair_lr

LeaveOut = Callable[[str, str], None]  # an image's name, and why it is left out


@dataclass(frozen=True)
class ImagePair:
    """One test image: `hr` is uint8 (H·scale, W·scale, 3), `lr` uint8 (H, W, 3)."""

    name: str
    lr: Image
    hr: Image


def read_pairs(hr: Path, lr: Path | None, scale: int, leave_out: LeaveOut | None = None) -> Iterator[ImagePair]:
    """Read the images of folder `hr`, with LR from folder `lr` or made from HR by `imresize`.

    LR images are found by stem, with or without `x4` behind it, and may be HR's size rounded up, as for `prep
    build-shards --lr`. Raises ShardsError for a folder without images, an image that cannot be read, and, listing
    them all before any image is given, LR images that are missing or have a wrong size; also for an image smaller than
    one LR pixel, unless `leave_out` takes it.
    """
    images = find_images([hr])
    given = None
    if lr is not None:
        given = pair_lr(images, lr, scale, equal_names=True)
        check_sizes(images, given, scale)
    for number, image in enumerate(images):
        pixels = read_image(image.path)
        height, width = (size // scale for size in pixels.shape[:2])
        if min(height, width) == 0:
            lack = f"expected at least {scale} x {scale} pixels, got {pixels.shape[0]} x {pixels.shape[1]}"
            if leave_out is None:
                raise ShardsError(one_line(f"{image.path}: {lack}"))
            leave_out(image.stem, lack)
            continue
        pixels = pixels[: height * scale, : width * scale]
        small = imresize(pixels, scale) if given is None else read_image(given[number].path)
        yield ImagePair(image.stem, small[:height, :width], pixels)


def large_enough(pairs: Iterable[ImagePair], border: int, leave_out: LeaveOut) -> Iterator[ImagePair]:
    """Give the pairs that can be scored inside a border; `leave_out` is told of the others."""
    for pair in pairs:
        height, width = pair.hr.shape[:2]
        if (lack := too_small(height, width, border)) is None:
            yield pair
        else:
            leave_out(pair.name, lack)


def shard_pairs(images: ImageDataset, numbers: Iterable[int] | None = None) -> Iterator[ImagePair]:
    """Give whole images of a dataset of shards: those of the given numbers, or all."""
    for number in range(len(images)) if numbers is None else numbers:
        lr, hr = (np.ascontiguousarray(side.permute(1, 2, 0).numpy()) for side in images[number])
        yield ImagePair(images.names[number], lr, hr)
