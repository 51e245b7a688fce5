"""Page advice on mapped files: local disks then read at their own speed, and page faults are few."""

import mmap
from dataclasses import dataclass

from loader.ahead.footprint import Asked, Plane, batch_ranges
from loader.pixels.byte_ranges import cut, inner_pages, merged, pages
from loader.pixels.files import Files
from loader.pixels.shards import Shards
from loader.pixels.tiles import Pixels
from loader.plan import Crops
from loader.system.filesystem import advice_limit, is_network


class MappedReader:
    """Reads by page faults on mapped files, after advice (MADV_WILLNEED) that has made them few."""

    def __init__(self, shards: Shards, planes: tuple[Plane, Plane], drop_pages: bool) -> None:
        self.asked = Asked()
        self.sides = (planes[0].side, planes[1].side)
        self._shards, self._planes = shards, planes
        self._limit, self._network = advice_limit(shards.folder), is_network(shards.folder)
        self._files = Files(shards.folder, shards.index) if drop_pages else None

    def ask(self, crops: Crops) -> "MappedTicket":
        """See Reader."""
        # Where all is in memory, advice would only cost time. (Nobody counts reads over a network.)
        if not self._network and not self._shards.watch.storage_in_use():
            return MappedTicket(self, crops)
        wanted = cut(merged(pages(batch_ranges(self._planes, crops))), self._limit)
        self._shards.advise(wanted.shard, wanted.start, wanted.stop, mmap.MADV_WILLNEED)
        self.asked += wanted
        return MappedTicket(self, crops)

    def gather(self, crops: Crops, lr: Pixels, hr: Pixels) -> None:
        """Copy a batch out of the mapped files."""
        for plane, out in zip(self._planes, (lr, hr), strict=True):
            plane.gather(crops, out)
        if self._files:
            done = inner_pages(merged(batch_ranges(self._planes, crops)))
            # The page cache keeps pages that are mapped: they are unmapped first.
            self._shards.advise(done.shard, done.start, done.stop, mmap.MADV_DONTNEED)
            self._files.drop(done)

    def close(self) -> None:
        """See Reader."""
        if self._files:
            self._files.close()


@dataclass(frozen=True)
class MappedTicket:
    """Crops whose pages were advised."""

    reader: MappedReader
    crops: Crops

    def gather(self, lr: Pixels, hr: Pixels) -> None:
        """See Ticket."""
        self.reader.gather(self.crops, lr, hr)
