"""Page advice on mapped files: local disks then read at their own speed, and page faults are few."""

import mmap
import resource
from dataclasses import dataclass
from pathlib import Path

from loader.files import Files
from loader.plan import Crops
from loader.planes import Asked, Plane, batch_ranges
from loader.ranges import cut, inner_pages, merged, pages
from loader.shards import Shards
from loader.storage import advice_limit
from loader.tiles import Pixels


class MappedReader:
    """Reads by page faults on mapped files, after advice (MADV_WILLNEED) that has made them few."""

    def __init__(self, shards: Shards, planes: tuple[Plane, Plane], drop_pages: bool) -> None:
        self.asked = Asked()
        self.sides = (planes[0].side, planes[1].side)
        self._shards, self._planes = shards, planes
        self._limit = advice_limit(shards.folder)
        self._watch = StorageWatch()
        self._files = Files(shards.folder, shards.index.shards) if drop_pages else None

    def ask(self, crops: Crops) -> "MappedTicket":
        """See Reader."""
        if not self._watch.storage_in_use():  # all is in memory: advice would only cost time
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


class StorageWatch:
    """Tells whether this process still reads from storage, by the system's own counts.

    Looked at once a batch. After QUIET looks without a byte read nor a page fault that waited for storage, it is taken
    that all is in memory. A fault shows that it is not, and counts for a good while.
    """

    QUIET = 32
    ALARM = 256

    def __init__(self) -> None:
        self._quiet = 0
        self._seen = storage_reads()

    def storage_in_use(self) -> bool:
        """Whether it was read of late; True where the system does not count."""
        seen, before = storage_reads(), self._seen
        if seen is None or before is None:
            return True
        self._seen = seen
        if seen[0] > before[0]:
            self._quiet = -self.ALARM
        elif seen[1] > before[1]:
            self._quiet = min(self._quiet, 0)
        else:
            self._quiet += 1
        return self._quiet < self.QUIET


def storage_reads() -> tuple[int, int] | None:
    """Page faults of this process that waited for storage, and bytes it had read from there; None if nobody counts."""
    try:
        text = Path("/proc/self/io").read_text()
    except OSError:
        return None
    counted = next((int(line.split()[1]) for line in text.splitlines() if line.startswith("read_bytes")), None)
    return None if counted is None else (resource.getrusage(resource.RUSAGE_SELF).ru_majflt, counted)
