"""Positional reads by a pool of threads: many requests in flight, where each takes long, as on network file systems."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from loader.files import Files
from loader.format import CHANNELS
from loader.plan import Crops
from loader.planes import Asked, Plane
from loader.ranges import Ranges, inner_pages
from loader.shards import Shards
from loader.tiles import Ints, Pixels, gather_crops

READ_THREADS = 32  # reads in flight
GAP = 128 << 10  # bytes worth reading to save a request where each takes milliseconds


class PositionalReader:
    """Reads by preadv into memory of its own, many crops at once; neither maps files nor trusts their length."""

    def __init__(self, shards: Shards, planes: tuple[Plane, Plane], drop_pages: bool) -> None:
        self.asked = Asked()
        self.sides = (planes[0].side, planes[1].side)
        self._planes, self._files = planes, Files(shards.folder, shards.index)
        self._drop = drop_pages
        self._pool = ThreadPoolExecutor(READ_THREADS, "srshards-read")

    def ask(self, crops: Crops) -> "PositionalTicket":
        """See Reader."""
        parts = []
        for plane in self._planes:
            corner = crops.top * plane.zoom, crops.left * plane.zoom
            plane.shards.check_crops(plane.scale, crops.image, *corner, (plane.side, plane.side))
            parts.append(_lay_out(plane, crops))
        for part in parts:
            self.asked += part.ranges
        reads = [self._pool.submit(self._read, part, first, last) for part in parts for first, last in part.by_crop()]
        return PositionalTicket(crops, parts, reads)

    def _read(self, part: "Scratch", first: int, last: int) -> None:
        for k in range(first, last):
            shard, start, stop = (int(column[k]) for column in vars(part.ranges).values())
            at = int(part.place[k])
            self._files.read(shard, start, part.memory[at : at + stop - start])
        if self._drop:
            done = Ranges(*(column[first:last] for column in vars(part.ranges).values()))
            self._files.drop(inner_pages(done))

    def close(self) -> None:
        """See Reader."""
        self._pool.shutdown(cancel_futures=True)
        self._files.close()


@dataclass(frozen=True)
class Scratch:
    """Memory for the tiles of a batch in one plane, what is read into it, and where each crop's tiles begin in it.

    place: int64 (m,), byte in `memory` of each range. crop: int64 (m,), the crop of each range. base: int64 (n,), byte
    at which a crop's first row of tiles would start; cols: int64 (n,), tiles from one row to the next. top, left: int64
    (n,), the crop's corner from there.
    """

    plane: Plane
    memory: Pixels
    ranges: Ranges
    place: Ints
    crop: Ints
    base: Ints
    cols: Ints
    top: Ints
    left: Ints

    def by_crop(self) -> Iterator[tuple[int, int]]:
        """The ranges of each crop: first, and one beyond the last."""
        edges = [0, *(np.flatnonzero(np.diff(self.crop)) + 1).tolist(), len(self.crop)]
        return pairwise(edges)

    def gather(self, transform: Ints, out: Pixels) -> None:
        """Copy the crops out of the memory, once all is read."""
        tile = self.plane.shards.index.planes[self.plane.scale].tile
        address = self.base + self.memory.ctypes.data
        gather_crops(address, self.cols, self.top, self.left, transform, tile, out)


@dataclass(frozen=True)
class PositionalTicket:
    """Crops whose bytes are being read."""

    crops: Crops
    parts: list[Scratch]
    reads: list[Future[None]]

    def gather(self, lr: Pixels, hr: Pixels) -> None:
        """See Ticket."""
        for read in self.reads:
            read.result()
        for part, out in zip(self.parts, (lr, hr), strict=True):
            part.gather(self.crops.transform, out)


def _lay_out(plane: Plane, crops: Crops) -> Scratch:
    """Decide what to read for crops, and where to put it."""
    tile = plane.shards.index.planes[plane.scale].tile
    whole = tile * tile * CHANNELS
    rows = plane.tile_rows(crops)
    # Where the tiles between one row's part and the next are few, one request takes them along.
    together = (rows.image_cols - rows.cols) * whole <= GAP
    cols = np.where(together, rows.image_cols, rows.cols)
    size = ((rows.rows - 1) * cols + rows.cols) * whole
    space = np.cumsum(size) - size  # where the first tile that a crop touches is put
    # Of crops whose rows go together only one range remains, from the first row's start to the last row's stop.
    first = ~together[rows.crop] | (rows.row == 0)
    last = ~together[rows.crop] | (rows.row == rows.rows[rows.crop] - 1)
    crop, row, start, stop = rows.crop[first], rows.row[first], rows.start[first], rows.stop[last]
    image = crops.image[crop]
    offset = plane.shards.index.planes[plane.scale].offset[image]
    row_start = ((rows.first_row[crop] + row) * rows.image_cols[crop] + rows.first_col[crop]) * whole
    place = space[crop] + row * cols[crop] * whole + start - row_start
    return Scratch(
        plane=plane,
        memory=np.empty(int(size.sum()), np.uint8),
        ranges=Ranges(plane.shards.index.shard[image], offset + start, offset + stop),
        place=place,
        crop=crop,
        base=space,
        cols=cols,
        top=crops.top * plane.zoom - rows.first_row * tile,
        left=crops.left * plane.zoom - rows.first_col * tile,
    )
