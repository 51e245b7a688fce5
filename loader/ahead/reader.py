"""Asking the storage for the bytes of coming batches, early and exactly, and gathering the batches when they are due.

There are two ways, for two kinds of storage: loader.ahead.advice and loader.ahead.positional.
"""

from typing import Literal, Protocol

from loader.ahead.advice import MappedReader
from loader.ahead.budget import Room
from loader.ahead.footprint import Asked, planes_of
from loader.ahead.positional import PositionalReader
from loader.pixels.shards import Shards
from loader.pixels.tiles import Pixels
from loader.plan import Crops
from loader.system.filesystem import is_network

Io = Literal["auto", "mmap", "pread"]


class Ticket(Protocol):
    """A batch that was asked for."""

    def gather(self, lr: Pixels, hr: Pixels) -> None:
        """Write the batch's crops to (n, p, p, 3) and (n, p·scale, p·scale, 3), waiting for what is not there yet."""


class Reader(Protocol):
    """A way of reading batches of crops: ask early, gather late. Any thread may do either."""

    asked: Asked
    sides: tuple[int, int]  # of LR and HR crops

    def ask(self, crops: Crops) -> Ticket:
        """Ask the storage for the bytes of a batch, without waiting for them."""

    def close(self) -> None:
        """End threads and close files; tickets not gathered are void. Whoever drops a reader need not close it."""


def open_reader(
    shards: Shards, scale: int, patch: int, io: Io = "auto", drop_pages: bool = False, room: Room | None = None
) -> Reader:
    """The way of reading that suits a dataset's storage, or the one asked for.

    Args:
        shards: the dataset.
        scale, patch: of the crops; the patch in LR pixels.
        io: "mmap": page advice; "pread": positional reads; "auto": positional reads on network file systems.
        drop_pages: let go of pages once they were gathered, so that the page cache stays small.
        room: bounds the memory that positional reads take before they are gathered, where one thread alone asks; once
            it is closed, no read is begun. None: as much as is asked for.
    """
    if io == "auto":
        io = "pread" if is_network(shards.folder) else "mmap"
    planes = planes_of(shards, scale, patch)
    if io == "pread":
        return PositionalReader(shards, planes, drop_pages, room)
    return MappedReader(shards, planes, drop_pages)
