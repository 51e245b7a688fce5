"""Positional reads (pread) by a pool of threads: many requests in flight, for storage with high latency (networks)."""

from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from queue import SimpleQueue

import numpy as np

from loader.ahead.budget import MemoryBudget
from loader.ahead.footprint import PatchSize, ReadCounts
from loader.format.layout import CHANNELS, Index
from loader.pixels.byte_ranges import Ranges, inner_pages, tile_rows
from loader.pixels.crops import PlaneCrops
from loader.pixels.files import Files
from loader.pixels.shards import Shards
from loader.pixels.tiles import Ints, Pixels, gather_crops
from loader.plan import Crops
from loader.system.crew import Crew

READ_THREADS = 32  # reads in flight
GAP = 128 << 10  # bytes worth reading to save one request

Outcomes = SimpleQueue[BaseException | None]  # of the reads of a batch: an error, or None


class PositionalReader:
    """Reads with preadv into its own buffers, many crops at once. Maps no files, so a file cut short is an error.

    Its threads start with the first read and stop when it is closed or dropped.
    """

    def __init__(
        self, shards: Shards, patch: PatchSize, drop_pages: bool = False, memory_limit: int | None = None
    ) -> None:
        self.patch, self.counts = patch, ReadCounts()
        self._shards = shards
        self._budget = None if memory_limit is None else MemoryBudget(memory_limit)
        self._queue: SimpleQueue[CropRead | None] = SimpleQueue()
        files = Files(shards.folder, shards.index)
        self._crew = Crew("srshards-read", partial(_serve, self._queue, files, drop_pages, self._budget), files.close)

    def ask(self, crops: Crops) -> "partial[None]":
        """See Reader."""
        layouts = []
        for plane in self.patch.in_planes(crops):
            self._shards.check_crops(plane)
            layouts.append(lay_out(self._shards.index, plane))
        if self._budget:
            self._budget.acquire(sum(layout.size for layout in layouts))
        filled = [(layout, np.empty(layout.size, np.uint8)) for layout in layouts]
        outcomes: Outcomes = SimpleQueue()
        reads = [
            CropRead(layout.ranges[some], layout.target[some], buffer, outcomes)
            for layout, buffer in filled
            for some in layout.by_crop()
        ]
        self._crew.grow(min(READ_THREADS, len(reads)))
        for layout in layouts:
            self.counts += layout.ranges
        for read in reads:
            self._queue.put(read)
        return partial(_gather, filled, len(reads), outcomes, self._budget)

    def cancel(self) -> None:
        """See Reader."""
        if self._budget:
            self._budget.close()

    def close(self) -> None:
        """See Reader."""
        self._queue.put(None)
        self._crew.wait()

    def __del__(self) -> None:
        if queue := vars(self).get("_queue"):
            queue.put(None)  # without waiting: see Crew


@dataclass(frozen=True)
class CropRead:
    """The reads of one crop in one plane: ranges of shards, and the byte of `buffer` that each goes to."""

    ranges: Ranges
    target: Ints
    buffer: Pixels
    outcomes: Outcomes


def _serve(queue: "SimpleQueue[CropRead | None]", files: Files, drop_pages: bool, budget: MemoryBudget | None) -> None:
    """Serve reads until None comes; leave it in the queue for the next thread."""
    while (read := queue.get()) is not None:
        try:
            if budget and budget.closed:
                raise CancelledError
            for at, (shard, start, stop) in zip(read.target.tolist(), read.ranges, strict=True):
                files.read(shard, start, read.buffer[at : at + stop - start])
            if drop_pages:
                files.drop(inner_pages(read.ranges))
        except BaseException as error:  # raised where the batch is gathered
            read.outcomes.put(error)
        else:
            read.outcomes.put(None)
        del read  # it keeps the buffer alive
    queue.put(None)


def _gather(
    filled: "list[tuple[ReadLayout, Pixels]]",
    reads: int,
    outcomes: Outcomes,
    budget: MemoryBudget | None,
    lr: Pixels,
    hr: Pixels,
) -> None:
    """Wait for the reads of a batch, copy its crops out of the buffers, and free those."""
    size = sum(layout.size for layout, _ in filled)
    try:
        for _ in range(reads):
            if error := outcomes.get():
                raise error
        for (layout, buffer), out in zip(filled, (lr, hr), strict=True):
            layout.gather(buffer, out)
            del buffer
    finally:
        filled.clear()
        if budget:
            budget.release(size)


@dataclass(frozen=True)
class ReadLayout:
    """What to read for the crops of one plane, and where the bytes land in one buffer of `size` bytes.

    A crop (dotted) in an image of 5 tiles per row; it touches tiles 6 to 8 and 11 to 13:

        +----+----+----+----+----+
        |  0 |  1 |  2 |  3 |  4 |
        +----+----+----+----+----+
        |  5 |  6 |  7 |  8 |  9 |
        |    |  ··|····|··  |    |
        +----+--··+····+··--+----+
        |    |  ··|····|··  |    |
        | 10 | 11 | 12 | 13 | 14 |
        +----+----+----+----+----+

        run of tiles in the file  …|  5 |  6 |  7 |  8 |  9 | 10 | 11 | 12 | 13 | 14 |…
        bytes touched                     [---------]              [---------]

    Each crop has its part of the buffer, laid out like a small image that starts with the first tile touched. The
    gather kernel can therefore read crops from buffers as it does from mapped files:

        gap larger than GAP             |  6 |  7 |  8 | 11 | 12 | 13 |               cols = 3
          two reads                       [---------]    [---------]
        smaller gap, read along         |  6 |  7 |  8 |  9 | 10 | 11 | 12 | 13 |     cols = 5
          one read                        [----------------------------------]

    Bytes of the buffer that no range covers stay undefined; no crop includes them.

    ranges: m byte ranges of shards. target: int64 (m,), byte of the buffer that each range is read to. crop: int64
    (m,), the crop that each range belongs to, ascending. tile: side of a tile. base: int64 (n,), byte of the buffer at
    which a crop's first tile starts. cols: int64 (n,), tiles per row there. top, left: int64 (n,), the crop's corner
    within its tiles. transform: int64 (n,), as in the crops.
    """

    size: int
    ranges: Ranges
    target: Ints
    crop: Ints
    tile: int
    base: Ints
    cols: Ints
    top: Ints
    left: Ints
    transform: Ints

    def by_crop(self) -> Iterator[slice]:
        """Yield which ranges belong to each crop."""
        edges = [0, *(np.flatnonzero(np.diff(self.crop)) + 1).tolist(), len(self.crop)]
        return (slice(first, end) for first, end in pairwise(edges))

    def gather(self, buffer: Pixels, out: Pixels) -> None:
        """Copy the crops out of a buffer that was filled."""
        address = self.base + buffer.ctypes.data
        gather_crops(address, self.cols, self.top, self.left, self.transform, self.tile, out)


def lay_out(index: Index, crops: PlaneCrops) -> ReadLayout:
    """Return what to read for crops, and where to put it."""
    plane = index.planes[crops.level]
    whole = plane.tile * plane.tile * CHANNELS
    rows = tile_rows(index, crops)
    one_read = (rows.image_cols - rows.cols) * whole <= GAP
    cols = np.where(one_read, rows.image_cols, rows.cols)
    size = ((rows.rows - 1) * cols + rows.cols) * whole
    base = np.cumsum(size) - size
    # A crop that is one read keeps one range, from the start of its first row to the end of its last.
    first = ~one_read[rows.crop] | (rows.row == 0)
    last = ~one_read[rows.crop] | (rows.row == rows.rows[rows.crop] - 1)
    crop, row, start, stop = rows.crop[first], rows.row[first], rows.start[first], rows.stop[last]
    image = crops.image[crop]
    offset = plane.offset[image]
    row_start = ((rows.first_row[crop] + row) * rows.image_cols[crop] + rows.first_col[crop]) * whole
    return ReadLayout(
        size=int(size.sum()),
        ranges=Ranges(index.shard[image], offset + start, offset + stop),
        target=base[crop] + row * cols[crop] * whole + start - row_start,
        crop=crop,
        tile=plane.tile,
        base=base,
        cols=cols,
        top=crops.top - rows.first_row * plane.tile,
        left=crops.left - rows.first_col * plane.tile,
        transform=crops.transform,
    )
