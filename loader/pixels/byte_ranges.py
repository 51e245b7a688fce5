"""Which bytes of which shards crops touch, exactly: one range for each row of tiles, before any merging."""

from dataclasses import dataclass

import numpy as np

from loader.format.layout import CHANNELS, PAGE, Index
from loader.pixels.tiles import Ints


@dataclass(frozen=True)
class Ranges:
    """Byte ranges [start, stop) of shards: int64 arrays of equal length."""

    shard: Ints
    start: Ints
    stop: Ints

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def bytes(self) -> int:
        """The bytes of all ranges together."""
        return int((self.stop - self.start).sum())


@dataclass(frozen=True)
class TileRows:
    """The part of crops in their images' tiles: which rows and columns of tiles, and the bytes touched in each row.

    first_row, rows, first_col, cols: int64 (n,), tiles that a crop touches. image_cols: int64 (n,), tiles in a whole
    row. crop: int64 (m,), the crop that each range belongs to. row: int64 (m,), the row of tiles within that crop.
    start, stop: int64 (m,), bytes from the start of the image's run.
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


def tile_rows(index: Index, scale: int, image: Ints, top: Ints, left: Ints, side: int) -> TileRows:
    """The rows of tiles that square crops touch.

    Args:
        index: the dataset.
        scale: plane (1: HR).
        image, top, left: int64 (n,), image numbers and corners in the plane's own pixels.
        side: of the crops, in the plane's own pixels.
    """
    tile = index.planes[scale].tile
    line, whole = tile * CHANNELS, tile * tile * CHANNELS
    first_row, first_col = top // tile, left // tile
    bottom, right = top + side - 1, left + side - 1  # the last pixels
    rows, cols = bottom // tile - first_row + 1, right // tile - first_col + 1
    image_cols = index.columns_of_tiles(scale, image)
    crop = np.repeat(np.arange(len(image)), rows)
    row = np.arange(len(crop)) - np.repeat(np.cumsum(rows) - rows, rows)
    # From the first pixel touched in the first tile of a row to the last one in its last tile: between lies nothing
    # but those tiles.
    before = ((first_row[crop] + row) * image_cols[crop] + first_col[crop]) * whole
    first_line = np.where(row == 0, top[crop] % tile, 0)
    last_line = np.where(row == rows[crop] - 1, bottom[crop] % tile, tile - 1)
    start = before + first_line * line + left[crop] % tile * CHANNELS
    stop = before + (cols[crop] - 1) * whole + last_line * line + (right[crop] % tile + 1) * CHANNELS
    return TileRows(first_row, rows, first_col, cols, image_cols, crop, row, start, stop)


def pages(ranges: Ranges) -> Ranges:
    """The whole pages that ranges touch."""
    return Ranges(ranges.shard, ranges.start // PAGE * PAGE, -(-ranges.stop // PAGE) * PAGE)


def inner_pages(ranges: Ranges) -> Ranges:
    """The pages that lie wholly within ranges."""
    start, stop = -(-ranges.start // PAGE) * PAGE, ranges.stop // PAGE * PAGE
    some = stop > start
    return Ranges(ranges.shard[some], start[some], stop[some])


def merged(ranges: Ranges) -> Ranges:
    """The same bytes in ascending order, ranges that touch or overlap made one."""
    if not len(ranges):
        return ranges
    order = np.lexsort((ranges.start, ranges.shard))
    shard, start, stop = ranges.shard[order], ranges.start[order], ranges.stop[order]
    # Add more than any offset for each shard, so that one running maximum of ends serves for all.
    base = shard * (int(stop.max()) + 1)
    reach = np.maximum.accumulate(base + stop)
    begins = np.concatenate([[True], base[1:] + start[1:] > reach[:-1]])
    first = np.flatnonzero(begins)
    ends = np.maximum.reduceat(stop, first)
    return Ranges(shard[first], start[first], ends)


def cut(ranges: Ranges, length: int) -> Ranges:
    """The same bytes in ranges of at most `length` each."""
    parts = -(-(ranges.stop - ranges.start) // length)
    which = np.repeat(np.arange(len(ranges)), parts)
    number = np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)
    start = ranges.start[which] + number * length
    return Ranges(ranges.shard[which], start, np.minimum(start + length, ranges.stop[which]))
