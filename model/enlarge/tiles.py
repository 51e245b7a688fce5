"""Enlarging a large image tile by tile, so that memory is bounded, to the values that the whole image would give.

A network of convolutions sees no farther than its radius r: an output pixel depends on the LR pixels at most r away
from its own. So each tile is read with r more pixels on every side (fewer where the image ends, where the network's
own padding belongs), enlarged, and only its inner part kept. Along an axis of n pixels there are k = ⌈n / tile⌉
tiles, about equally large, and tile i keeps the pixels from ⌊i·n / k⌋ to ⌊(i + 1)·n / k⌋.
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
    """Tiles of at most `tile` x `tile` LR pixels, read with `overlap` more on each side; ValueError if they cannot be.

    An overlap of at least `receptive_radius(network)` gives what the whole image gives, a smaller one seams.
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
    """A tile along one axis, in LR pixels: the range that is read, and the part of it that is kept."""

    read_start: int
    read_stop: int
    start: int
    stop: int


Tile = tuple[TileSpan, TileSpan]  # its rows, its columns
TileProgress = Callable[[Sequence[Tile]], Iterable[Tile]]


def cut_axis(length: int, tiling: Tiling) -> Iterator[TileSpan]:
    """Cut an axis of `length` LR pixels into tiles; what they keep covers it without gap or overlap."""
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
    """Enlarge `lr`, (N, C, H, W), by `forward`, tile by tile or (None) as a whole, and `finish` every part.

    `finish` works on each pixel for itself; where it makes the values small (uint8) or takes them off the device, only
    one tile is ever large, or there. The result has the type and the device that it gives. `progress` is handed the
    tiles and gives them back one after another: a place for a progress bar.
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
            # As the parts are, and pictures: their channels side by side.
            whole = torch.empty(size, dtype=part.dtype, device=part.device, memory_format=torch.channels_last)
        whole[..., y.start * scale : y.stop * scale, x.start * scale : x.stop * scale] = part
    if whole is None:
        raise ValueError(f"expected at least one pixel, got {height} x {width}")
    return whole
