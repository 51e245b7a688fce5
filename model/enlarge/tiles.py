"""Tiled inference: enlarge a large image in bounded memory, with the same result as enlarging it whole.

An output pixel of a convolutional network depends only on LR pixels within its receptive radius r. So each tile is
read with an overlap of r pixels on every side (fewer at the image's edge, where the network pads as usual), enlarged,
and cropped to its inner part. An axis of n pixels has k = ⌈n / tile⌉ tiles of nearly equal size; tile i keeps pixels
⌊i·n / k⌋ to ⌊(i + 1)·n / k⌋.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tiling:
    """Tiles of at most `tile` x `tile` LR pixels, read with `overlap` more on each side.

    With an overlap of at least `receptive_radius(network)` the result equals that of the whole image; with less there
    are seams. Raises ValueError for a tile below 1 pixel or a negative overlap.
    """

    tile: int
    overlap: int

    def __post_init__(self) -> None:
        if self.tile < 1:
            raise ValueError(f"tile must be at least 1 pixel, got {self.tile}")
        if self.overlap < 0:
            raise ValueError(f"overlap must be at least 0 pixels, got {self.overlap}")


@dataclass(frozen=True)
class TileSpan:
    """A tile's extent along one axis, in LR pixels: the range that is read, and the part of it that is kept."""

    read_start: int
    read_stop: int
    start: int
    stop: int


Tile = tuple[TileSpan, TileSpan]  # rows, columns
TileProgress = Callable[[Sequence[Tile]], Iterable[Tile]]


def cut_axis(length: int, tiling: Tiling) -> Iterator[TileSpan]:
    """Yield the tiles of an axis of `length` LR pixels; their kept parts cover it exactly once."""
    count = -(-length // tiling.tile)
    for i in range(count):
        start, stop = i * length // count, (i + 1) * length // count
        yield TileSpan(max(0, start - tiling.overlap), min(length, stop + tiling.overlap), start, stop)


def enlarge_in_tiles(
    forward: Forward,
    lr: Tensor,
    tiling: Tiling | None,
    finish: Forward = lambda sr: sr,
    progress: TileProgress = lambda tiles: tiles,
) -> Tensor:
    """Enlarge `lr`, (N, C, H, W), by `forward`, tile by tile or, if `tiling` is None, as a whole.

    Args:
        forward: maps (N, C, h, w) to (N, C, h·scale, w·scale).
        lr: the image.
        tiling: the tiles.
        finish: a per-pixel function applied to each tile, such as a conversion to uint8 on the CPU; the result has
            its dtype and device, so that only one tile at a time is in float32 on the device.
        progress: an iterator over the tiles, such as a progress bar.
    """
    if tiling is None:
        return finish(forward(lr))
    height, width = lr.shape[-2:]
    whole: Tensor | None = None
    for y, x in progress([*product(cut_axis(height, tiling), cut_axis(width, tiling))]):
        sr = forward(lr[..., y.read_start : y.read_stop, x.read_start : x.read_stop])
        scale = sr.shape[-1] // (x.read_stop - x.read_start)
        rows, columns = (
            slice((span.start - span.read_start) * scale, (span.stop - span.read_start) * scale) for span in (y, x)
        )
        part = finish(sr[..., rows, columns])
        if whole is None:
            size = (*part.shape[:-2], height * scale, width * scale)
            # The memory layout of the tiles, and of images: (N, H, W, C).
            whole = torch.empty(size, dtype=part.dtype, device=part.device, memory_format=torch.channels_last)
        whole[..., y.start * scale : y.stop * scale, x.start * scale : x.stop * scale] = part
    if whole is None:
        raise ValueError(f"expected at least one pixel, got {height} x {width}")
    return whole
