"""The bytes of shards that crops touch: ranges exact to the byte, and operations on them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loader.format.layout import CHANNELS, PAGE, Index
from loader.pixels.crops import PlaneCrops
from loader.pixels.tiles import Ints


@dataclass(frozen=True)
class Ranges:
    """Byte ranges [start, stop) of shards: int64 arrays of equal length."""

    shard: Ints
    start: Ints
    stop: Ints

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, which: slice | NDArray[np.bool_]) -> "Ranges":
        return Ranges(self.shard[which], self.start[which], self.stop[which])

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return zip(self.shard.tolist(), self.start.tolist(), self.stop.tolist(), strict=True)

    @property
    def bytes(self) -> int:
        """Total length."""
        return int((self.stop - self.start).sum())


@dataclass(frozen=True)
class TileRows:
    """The rows of tiles that n crops touch, m in total, and the bytes touched in each.

    first_row, rows, first_col, cols: int64 (n,), the block of tiles that a crop touches. image_cols: int64 (n,), tiles
    per row of the image. crop: int64 (m,), the crop that a row belongs to. row: int64 (m,), its number within that
    crop's block. start, stop: int64 (m,), byte range within the image's run of tiles.
    """

    first_row: Ints
    rows: Ints
    first_col: Ints
    cols: Ints
    image_cols: Ints
    crop: Ints
    row: Ints
    start: Ints
    stop: Ints


def tile_rows(index: Index, crops: PlaneCrops) -> TileRows:
    """Return the rows of tiles that crops touch."""
    tile = index.planes[crops.level].tile
    line, whole = tile * CHANNELS, tile * tile * CHANNELS
    first_row, first_col = crops.top // tile, crops.left // tile
    bottom, right = crops.top + crops.side - 1, crops.left + crops.side - 1  # the last pixels
    rows, cols = bottom // tile - first_row + 1, right // tile - first_col + 1
    image_cols = index.columns_of_tiles(crops.level, crops.image)
    crop = np.repeat(np.arange(len(crops)), rows)
    row = np.arange(len(crop)) - np.repeat(np.cumsum(rows) - rows, rows)
    # From the first pixel touched in a row's first tile to the last pixel touched in its last tile.
    before = ((first_row[crop] + row) * image_cols[crop] + first_col[crop]) * whole
    first_line = np.where(row == 0, crops.top[crop] % tile, 0)
    last_line = np.where(row == rows[crop] - 1, bottom[crop] % tile, tile - 1)
    start = before + first_line * line + crops.left[crop] % tile * CHANNELS
    stop = before + (cols[crop] - 1) * whole + last_line * line + (right[crop] % tile + 1) * CHANNELS
    return TileRows(first_row, rows, first_col, cols, image_cols, crop, row, start, stop)


def crop_ranges(index: Index, crops: PlaneCrops) -> Ranges:
    """Return the bytes that crops touch, one range per row of tiles."""
    touched = tile_rows(index, crops)
    image = crops.image[touched.crop]
    offset = index.planes[crops.level].offset[image]
    return Ranges(index.shard[image], offset + touched.start, offset + touched.stop)


def concatenated(parts: Sequence[Ranges]) -> Ranges:
    """Return the ranges of all parts, in order."""
    return Ranges(
        np.concatenate([part.shard for part in parts]),
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.stop for part in parts]),
    )


def pages(ranges: Ranges) -> Ranges:
    """Return the pages that ranges touch."""
    return Ranges(ranges.shard, ranges.start // PAGE * PAGE, -(-ranges.stop // PAGE) * PAGE)


def inner_pages(ranges: Ranges) -> Ranges:
    """Return the pages that lie entirely within a range."""
    inner = Ranges(ranges.shard, -(-ranges.start // PAGE) * PAGE, ranges.stop // PAGE * PAGE)
    return inner[inner.stop > inner.start]


def merged(ranges: Ranges) -> Ranges:
    """Return the same bytes in ascending order, adjacent and overlapping ranges merged."""
    if not len(ranges):
        return ranges
    order = np.lexsort((ranges.start, ranges.shard))
    shard, start, stop = ranges.shard[order], ranges.start[order], ranges.stop[order]
    # Shift each shard beyond all offsets of the one before, so that one running maximum of ends covers them all.
    base = shard * (int(stop.max()) + 1)
    reach = np.maximum.accumulate(base + stop)
    begins = np.concatenate([[True], base[1:] + start[1:] > reach[:-1]])
    first = np.flatnonzero(begins)
    ends = np.maximum.reduceat(stop, first)
    return Ranges(shard[first], start[first], ends)


def cut(ranges: Ranges, length: int) -> Ranges:
    """Return the same bytes in ranges of at most `length`."""
    parts = -(-(ranges.stop - ranges.start) // length)
    which = np.repeat(np.arange(len(ranges)), parts)
    number = np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)
    start = ranges.start[which] + number * length
    return Ranges(ranges.shard[which], start, np.minimum(start + length, ranges.stop[which]))
