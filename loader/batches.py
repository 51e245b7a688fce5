"""PatchLoader: whole batches of a PatchDataset, asked of the storage and gathered ahead of time by threads."""

import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from loader.dataset import Pair, PatchDataset, channels_first, need
from loader.format import ShardsError
from loader.pipeline import default_readahead, run
from loader.plan import Crops
from loader.readahead import Io, open_reader
from loader.tiles import Pixels


@dataclass(frozen=True)
class Stats:
    """What a PatchLoader did so far: batches given, seconds its user waited for them, bytes and requests asked for."""

    batches: int
    waited: float
    bytes_asked: int
    requests: int


@dataclass(frozen=True)
class Step:
    """The samples of one batch: global number of the first one, and how many."""

    first: int
    count: int


class PatchLoader:
    """Batches (lr, hr) of a PatchDataset, for ever: uint8 (n, 3, p, p) and (n, 3, p·scale, p·scale), channels last.

    The stream of samples is that of the dataset, epoch after epoch from 0 on: global sample g is sample g % L of epoch
    g // L, with L = len(dataset). It is read in order, since the plan is random already. Step k of all ranks together
    holds the samples from start + k·batch_size·world_size on, in order of rank, however many ranks there are.

    Batches are made ahead of time by threads, which end with the iterator. A batch's memory is used again once nothing
    refers to it; batches that are kept stay as they are, and keep nothing waiting.

    Args:
        dataset: what to read; its own epoch does not matter.
        batch_size: samples in a batch, of this rank.
        rank, world_size: which share of each step to give, out of how many.
        start: global number of the first sample.
        epochs: end after so many; the last step may be short, but is equally so for all ranks. None: never end.
        io: how to ask for data: page advice ("mmap"), positional reads ("pread"), or what suits the storage ("auto").
        readahead: batches to ask the storage for before their turn; None: as many as hold 256 samples, at least 2.
        threads: that gather batches.
        pin_memory: give batches in page-locked memory, for copies to a GPU; None: where there is CUDA.
        drop_pages: let go of pages after use, where the page cache counts against a limit of memory.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        dataset: PatchDataset,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        epochs: int | None = None,
        io: Io = "auto",
        readahead: int | None = None,
        threads: int = 2,
        pin_memory: bool | None = None,
        drop_pages: bool = False,
    ) -> None:
        need("batch_size", "1 or more", batch_size, batch_size >= 1)
        need("rank", f"0 to world_size - 1 = {world_size - 1}", rank, 0 <= rank < world_size)
        need("start", "0 or more", start, start >= 0)
        need("epochs", "1 or more, or None", epochs, epochs is None or epochs >= 1)
        need("io", '"auto", "mmap" or "pread"', io, io in ("auto", "mmap", "pread"))
        need("readahead", "0 or more, or None", readahead, readahead is None or readahead >= 0)
        need("threads", "1 or more", threads, threads >= 1)
        self.dataset, self.batch_size, self.rank, self.world_size = dataset, batch_size, rank, world_size
        self.start, self.epochs, self.io, self.threads, self.drop_pages = start, epochs, io, threads, drop_pages
        self.readahead = default_readahead(batch_size) if readahead is None else readahead
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._memory = Memory(self.pin_memory, spare=2 * (threads + 3))
        self._end = sys.maxsize if epochs is None else epochs * len(dataset)
        self._next = start
        self._batches, self._waited, self._bytes, self._requests = 0, 0.0, 0, 0

    def __len__(self) -> int:
        """Batches from `start` to the end; TypeError where there is none."""
        if self.epochs is None:
            raise TypeError("a PatchLoader without epochs has no length")
        left = max(self._end - self.start, 0)
        whole, rest = divmod(left, self.batch_size * self.world_size)
        return whole + (rest >= self.world_size)

    def __iter__(self) -> Iterator[Pair]:
        """Begin at `start`."""
        self._next = self.start
        return self._stream()

    def stats(self) -> Stats:
        """What was done so far, by all iterators together."""
        return Stats(self._batches, self._waited, self._bytes, self._requests)

    def state_dict(self) -> dict[str, int]:
        """The place in the stream after the last batch given: it fits any batch size and number of ranks."""
        return {"sample": self._next, "seed": self.dataset.seed, "length": len(self.dataset)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iterator begin where another loader was.

        Raises:
            ShardsError: that loader read another stream: its seed or its dataset's length differs.
        """
        for key, ours in (("seed", self.dataset.seed), ("length", len(self.dataset))):
            if state[key] != ours:
                raise ShardsError(f"place in the sample stream: {key}: expected {ours}, got {state[key]}")
        self.start = self._next = state["sample"]

    def _steps(self) -> Iterator[Step]:
        first, together = self.start, self.batch_size * self.world_size
        while self._end - first >= self.world_size:
            count = min(self.batch_size, (self._end - first) // self.world_size)
            yield Step(first + self.rank * count, count)
            first += together

    def _stream(self) -> Iterator[Pair]:
        data = self.dataset
        reader = open_reader(data.shards, data.scale, data.lr_patch, self.io, self.drop_pages)
        draws = (partial(crops_of, data, step) for step in self._steps())
        with closing(run(reader, draws, self.readahead, self.threads, self._memory.take)) as batches:
            before, asked = time.perf_counter(), reader.asked
            for lr, hr in batches:
                now, seen = reader.asked, asked
                self._waited += time.perf_counter() - before
                self._batches += 1
                self._bytes += now.bytes - seen.bytes
                self._requests += now.requests - seen.requests
                asked = now
                self._next = min(self._next + self.batch_size * self.world_size, self._end)
                pair = channels_first(lr), channels_first(hr)
                del lr, hr  # what nobody refers to is used again
                yield pair
                del pair
                before = time.perf_counter()


def crops_of(dataset: PatchDataset, step: Step) -> Crops:
    """The crops of consecutive global samples, which may lie in several epochs."""
    parts, first, left = [], step.first, step.count
    while left:
        epoch, n = divmod(first, len(dataset))
        count = min(left, len(dataset) - n)
        parts.append(dataset.plan.crops(epoch, np.arange(n, n + count)))
        first, left = first + count, left - count
    if len(parts) == 1:
        return parts[0]
    return Crops(*(np.concatenate([vars(part)[key] for part in parts]) for key in vars(parts[0])))


def to_float(batch: Pair, device: torch.device | str) -> Pair:
    """A batch on a device, as float32 in [0, 1]; it travels as bytes, and keeps its channels-last memory."""
    lr, hr = (part.to(device, non_blocking=True).float().div_(255) for part in batch)
    return lr, hr


class Memory:
    """Arrays for batches, handed out again when nobody refers to them any more.

    Page-locked memory is left to torch's own allocator: it knows when a copy to the GPU has ended.
    """

    def __init__(self, pinned: bool, spare: int) -> None:
        self._pinned, self._spare = pinned, spare
        self._arrays: deque[Pixels] = deque()
        self._guard = threading.Lock()

    def take(self, shape: tuple[int, ...]) -> Pixels:
        """An array of that shape, of any content; any thread may ask."""
        if self._pinned:
            return aligned(shape, pinned=True)
        with self._guard:
            for i in range(len(self._arrays)):
                # Two references: that of the deque, and that of the call. A tensor over the array adds one.
                if self._arrays[i].shape == shape and sys.getrefcount(self._arrays[i]) <= 2:
                    return self._arrays[i]
            array = aligned(shape)
            self._arrays.append(array)
            while len(self._arrays) > self._spare:
                self._arrays.popleft()
            return array


def aligned(shape: tuple[int, ...], pinned: bool = False) -> Pixels:
    """Memory of any content that starts on a cache line, as torch gives it; numpy's does not."""
    memory: Pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned).numpy()
    return memory
