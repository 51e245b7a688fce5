"""Batch readers: request the bytes of a batch from storage early, gather the batch later.

Local disks and network file systems need different requests: loader.ahead.advice and loader.ahead.positional.
"""

from collections.abc import Callable
from typing import Literal, Protocol

from loader.ahead.advice import MappedReader
from loader.ahead.footprint import PatchSize, ReadCounts
from loader.ahead.positional import PositionalReader
from loader.pixels.shards import Shards
from loader.pixels.tiles import Pixels
from loader.plan import Crops
from loader.system.filesystem import is_network

Io = Literal["auto", "mmap", "pread"]
# Writes a batch to memory for LR and HR crops, uint8 (n, side, side, 3), once its bytes are there.
Gather = Callable[[Pixels, Pixels], None]


class Reader(Protocol):
    """Reads batches of crops. Any thread may call its methods."""

    patch: PatchSize
    counts: ReadCounts

    def ask(self, crops: Crops) -> Gather:
        """Request the bytes of a batch without waiting for them; return the function that gathers the batch."""

    def cancel(self) -> None:
        """Begin no further reads. Takes no lock, so finalisers may call it."""

    def close(self) -> None:
        """Stop threads and close files; batches not gathered yet are lost. A reader may also just be dropped."""


def open_reader(
    shards: Shards,
    scale: int,
    patch: int,
    io: Io = "auto",
    drop_pages: bool = False,
    memory_limit: int | None = None,
) -> Reader:
    """Return a reader that suits the dataset's storage, or the one requested.

    Args:
        shards: the dataset.
        scale, patch: of the crops; the patch in LR pixels.
        io: "mmap": page advice; "pread": positional reads; "auto": positional reads on network file systems.
        drop_pages: release pages once they were gathered, which keeps the page cache small.
        memory_limit: bytes that positional reads may fill before they are gathered, or two batches' if larger. One
            thread only may then call `ask`, which waits for memory. None: no limit.
    """
    if io == "auto":
        io = "pread" if is_network(shards.folder) else "mmap"
    size = PatchSize(scale, patch)
    if io == "pread":
        return PositionalReader(shards, size, drop_pages, memory_limit)
    return MappedReader(shards, size, drop_pages)
