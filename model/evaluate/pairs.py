"""Test images as pairs of HR and LR: from folders, with LR read or made by MATLAB's bicubic, or from shards.

Images are uint8 arrays (H, W, 3), RGB. HR is cropped at the bottom and right to a multiple of the scale, as is usual
in the literature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loader import ImageDataset
from loader.errors import ShardsError, one_line
from loader.resize.imresize import imresize
from model.metrics import Image, size_error
from prep.images.decode import read_image
from prep.images.find import find_images
from prep.images.pair import check_sizes, pair_lr

LeaveOut = Callable[[str, str], None]  # called with an image's name and the reason


@dataclass(frozen=True)
class ImagePair:
    """A test image: `hr` is uint8 (H·scale, W·scale, 3), `lr` uint8 (H, W, 3)."""

    name: str
    lr: Image
    hr: Image


def read_pairs(hr: Path, lr: Path | None, scale: int, leave_out: LeaveOut | None = None) -> Iterator[ImagePair]:
    """Yield the images of folder `hr`, with LR from folder `lr` or made from HR by `imresize`.

    LR files have the stem of their HR file, with or without a suffix like `x4`; as in `prep build-shards --lr`, their
    size may be HR's divided by the scale and rounded up. Images smaller than one LR pixel go to `leave_out`.

    Raises ShardsError for a folder without images; for LR images that are missing or have the wrong size (all are
    listed, before the first image is read); for an unreadable image; without `leave_out`, for one that is too small.
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
            reason = f"expected at least {scale} x {scale} pixels, got {pixels.shape[0]} x {pixels.shape[1]}"
            if leave_out is None:
                raise ShardsError(one_line(f"{image.path}: {reason}"))
            leave_out(image.stem, reason)
            continue
        pixels = pixels[: height * scale, : width * scale]
        small = imresize(pixels, scale) if given is None else read_image(given[number].path)
        yield ImagePair(image.stem, small[:height, :width], pixels)


def large_enough(pairs: Iterable[ImagePair], border: int, leave_out: LeaveOut) -> Iterator[ImagePair]:
    """Yield the pairs large enough to score inside a border; call `leave_out` with the others."""
    for pair in pairs:
        height, width = pair.hr.shape[:2]
        if (reason := size_error(height, width, border)) is None:
            yield pair
        else:
            leave_out(pair.name, reason)


def shard_pairs(images: ImageDataset, numbers: Iterable[int] | None = None) -> Iterator[ImagePair]:
    """Yield whole images of a dataset of shards: those with the given numbers, or all."""
    for number in range(len(images)) if numbers is None else numbers:
        lr, hr = (np.ascontiguousarray(side.permute(1, 2, 0).numpy()) for side in images[number])
        yield ImagePair(images.names[number], lr, hr)
