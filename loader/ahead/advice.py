"""Page advice on mapped files: local disks then read at full speed, with few page faults."""

import mmap
from functools import partial

from loader.ahead.footprint import BatchCrops, PatchSize, ReadCounts, footprint
from loader.pixels.byte_ranges import cut, inner_pages, merged, pages
from loader.pixels.files import Files
from loader.pixels.shards import Shards
from loader.pixels.tiles import Pixels
from loader.plan import Crops
from loader.system.filesystem import advice_limit, is_network


class MappedReader:
    """Reads mapped files by page faults, most of them avoided by advice (MADV_WILLNEED) ahead of time."""

    def __init__(self, shards: Shards, patch: PatchSize, drop_pages: bool) -> None:
        self.patch, self.counts = patch, ReadCounts()
        self._shards = shards
        self._limit, self._network = advice_limit(shards.folder), is_network(shards.folder)
        self._files = Files(shards.folder, shards.index) if drop_pages else None

    def ask(self, crops: Crops) -> "partial[None]":
        """See Reader."""
        planes = self.patch.in_planes(crops)
        # Advice on pages that are in memory only costs time. (Reads over a network are not counted by the system.)
        if self._network or self._shards.watch.storage_in_use():
            wanted = cut(merged(pages(footprint(self._shards.index, planes))), self._limit)
            self._shards.advise(wanted, mmap.MADV_WILLNEED)
            self.counts += wanted
        return partial(self.gather, planes)

    def gather(self, crops: BatchCrops, lr: Pixels, hr: Pixels) -> None:
        """Copy a batch out of the mapped files."""
        for plane, out in zip(crops, (lr, hr), strict=True):
            self._shards.gather(plane, out)
        if self._files:
            done = inner_pages(merged(footprint(self._shards.index, crops)))
            # The page cache keeps mapped pages: unmap them first.
            self._shards.advise(done, mmap.MADV_DONTNEED)
            self._files.drop(done)

    def cancel(self) -> None:
        """See Reader."""

    def close(self) -> None:
        """See Reader."""
        if self._files:
            self._files.close()
