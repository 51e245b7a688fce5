"""Test images in pairs: HR read from a folder, with LR read or made by MATLAB's bicubic, or both from shards.

Images are uint8 arrays (H, W, 3), RGB. HR images whose size is no multiple of the scale are cropped at the
bottom and right, as everyone does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loader import ImageDataset
from loader.format import ShardsError
from model.metrics import Image
from prep.images import check_sizes, find_images, pair_lr, read_image
from prep.imresize import imresize


@dataclass(frozen=True)
class Pair:
    """One test image: `hr` is uint8 (H·scale, W·scale, 3), `lr` uint8 (H, W, 3)."""

    name: str
    lr: Image
    hr: Image


def read_pairs(hr: Path, lr: Path | None, scale: int) -> Iterator[Pair]:
    """Read the images of folder `hr`, with LR from folder `lr` or made from HR by `imresize`.

    LR images are found by stem, and may be HR's size rounded up, as for `prep build-shards --lr`. Raises
    ShardsError for a folder without images, an image that cannot be read, and, listing them all before any image
    is given, LR images that are missing or have a wrong size.
    """
    images = find_images([hr])
    given = None
    if lr is not None:
        given = pair_lr(images, lr, scale)
        check_sizes(images, given, scale)
    for number, image in enumerate(images):
        pixels = read_image(image.path)
        height, width = (size // scale for size in pixels.shape[:2])
        if min(height, width) == 0:
            raise ShardsError(f"{image.path}: expected at least {scale} x {scale} pixels, got {pixels.shape[:2]}")
        pixels = pixels[: height * scale, : width * scale]
        small = imresize(pixels, scale) if given is None else read_image(given[number].path)
        yield Pair(image.stem, small[:height, :width], pixels)


def shard_pairs(images: ImageDataset, numbers: Iterable[int] | None = None) -> Iterator[Pair]:
    """Give whole images of a dataset of shards: those of the given numbers, or all."""
    for number in range(len(images)) if numbers is None else numbers:
        lr, hr = (np.ascontiguousarray(side.permute(1, 2, 0).numpy()) for side in images[number])
        yield Pair(images.names[number], lr, hr)
