"""Positional reads by a pool of threads: many requests in flight, where each takes long, as on network file systems."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from queue import SimpleQueue

import numpy as np

from loader.ahead.budget import Room
from loader.ahead.footprint import Asked, Plane
from loader.format.layout import CHANNELS
from loader.pixels.byte_ranges import Ranges, inner_pages
from loader.pixels.files import Files
from loader.pixels.shards import Shards
from loader.pixels.tiles import Ints, Pixels, gather_crops
from loader.plan import Crops
from loader.system.crew import Crew

READ_THREADS = 32  # reads in flight
GAP = 128 << 10  # bytes worth reading to save a request where each takes milliseconds


class CancelledError(Exception):
    """A read that was not begun, since nobody waits for it any more."""


@dataclass(frozen=True)
class Read:
    """The bytes of one crop in one plane: ranges [first, last) of a batch; what went wrong, or None, goes to `done`."""

    layout: "Layout"
    memory: Pixels
    first: int
    last: int
    done: SimpleQueue[BaseException | None]


class PositionalReader:
    """Reads by preadv into memory of its own, many crops at once; neither maps files nor trusts their length.

    Its threads start when there is something to read, and end when it is closed or dropped.
    """

    def __init__(self, shards: Shards, planes: tuple[Plane, Plane], drop_pages: bool, room: Room | None = None) -> None:
        self.asked = Asked()
        self.sides = (planes[0].side, planes[1].side)
        self._planes, self._room = planes, room
        self._reads: SimpleQueue[Read | None] = SimpleQueue()
        files = Files(shards.folder, shards.index)
        self._crew = Crew("srshards-read", partial(_read_all, self._reads, files, drop_pages, room), files.close)

    def ask(self, crops: Crops) -> "PositionalTicket":
        """See Reader."""
        layouts = []
        for plane in self._planes:
            corner = crops.top * plane.zoom, crops.left * plane.zoom
            plane.shards.check_crops(plane.scale, crops.image, *corner, (plane.side, plane.side))
            layouts.append(_lay_out(plane, crops))
        if self._room:
            self._room.take(sum(layout.size for layout in layouts))
        parts = [(layout, np.empty(layout.size, np.uint8)) for layout in layouts]
        done: SimpleQueue[BaseException | None] = SimpleQueue()
        reads = [Read(*part, first, last, done) for part in parts for first, last in part[0].by_crop()]
        self._crew.grow(min(READ_THREADS, len(reads)))
        for layout in layouts:
            self.asked += layout.ranges
        for read in reads:
            self._reads.put(read)
        return PositionalTicket(crops, parts, len(reads), done, self._room)

    def close(self) -> None:
        """See Reader."""
        self._reads.put(None)
        self._crew.wait()

    def __del__(self) -> None:
        if reads := vars(self).get("_reads"):
            reads.put(None)  # and wait for nothing: see Crew


def _read_all(reads: SimpleQueue[Read | None], files: Files, drop_pages: bool, room: Room | None) -> None:
    """Serve reads until there is a None among them, which is left to the next thread."""
    while (read := reads.get()) is not None:
        try:
            if room and room.closed:
                raise CancelledError
            _read(read, files, drop_pages)
        except BaseException as error:  # for who waits
            read.done.put(error)
        else:
            read.done.put(None)
        del read  # and its memory
    reads.put(None)


def _read(read: Read, files: Files, drop_pages: bool) -> None:
    ranges = Ranges(*(column[read.first : read.last] for column in vars(read.layout.ranges).values()))
    place = read.layout.place[read.first : read.last]
    for at, shard, start, stop in zip(place, *vars(ranges).values(), strict=True):
        files.read(int(shard), int(start), read.memory[at : at + stop - start])
    if drop_pages:
        files.drop(inner_pages(ranges))


@dataclass(frozen=True)
class Layout:
    """What to read of a batch in one plane, and where in `size` bytes of memory each crop's tiles begin then.

    place: int64 (m,), byte in memory of each range. crop: int64 (m,), the crop of each range. base: int64 (n,), byte
    at which a crop's first row of tiles would start; cols: int64 (n,), tiles from one row to the next. top, left: int64
    (n,), the crop's corner from there.
    """

    plane: Plane
    size: int
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

    def gather(self, memory: Pixels, transform: Ints, out: Pixels) -> None:
        """Copy the crops out of the memory, once all is read."""
        tile = self.plane.shards.index.planes[self.plane.scale].tile
        address = self.base + memory.ctypes.data
        gather_crops(address, self.cols, self.top, self.left, transform, tile, out)


@dataclass(frozen=True)
class PositionalTicket:
    """Crops whose bytes are being read."""

    crops: Crops
    parts: list[tuple[Layout, Pixels]]
    reads: int
    done: SimpleQueue[BaseException | None]
    room: Room | None

    def gather(self, lr: Pixels, hr: Pixels) -> None:
        """See Ticket."""
        try:
            for _ in range(self.reads):
                if error := self.done.get():
                    raise error
            for (layout, memory), out in zip(self.parts, (lr, hr), strict=True):
                layout.gather(memory, self.crops.transform, out)
                del memory
        finally:
            size = sum(layout.size for layout, _ in self.parts)
            self.parts.clear()
            if self.room:
                self.room.give(size)


def _lay_out(plane: Plane, crops: Crops) -> Layout:
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
    return Layout(
        plane=plane,
        size=int(size.sum()),
        ranges=Ranges(plane.shards.index.shard[image], offset + start, offset + stop),
        place=place,
        crop=crop,
        base=space,
        cols=cols,
        top=crops.top * plane.zoom - rows.first_row * tile,
        left=crops.left * plane.zoom - rows.first_col * tile,
    )
