"""PatchLoader: batches of a PatchDataset, read ahead by threads."""

import operator
import os
from collections.abc import Mapping
from functools import partial
from typing import Any, SupportsIndex

import torch

from loader.ahead.budget import READ_BUFFERS
from loader.ahead.pipeline import Pipeline, default_readahead
from loader.ahead.reader import Io, open_reader
from loader.arguments import require
from loader.dataset import LrHr, PatchDataset
from loader.stream.buffers import BatchBuffers
from loader.stream.iterator import PatchIterator, Position, stream_of
from loader.stream.position import MAX_POSITION
from loader.stream.stats import SharedStats, Stats
from loader.stream.steps import RankSteps, draw_crops

MAX_READAHEAD = 1 << 16  # batches


class PatchLoader:
    """An endless stream of batches (lr, hr): uint8 (n, 3, p, p) and (n, 3, p·scale, p·scale), channels last.

    Sample g of the stream is sample g % L of epoch g // L of the dataset, with L = len(dataset). The stream starts at
    the dataset's current epoch. Step k of all ranks together holds the batch_size·world_size samples from
    start + k·batch_size·world_size on, in order of rank.

    Each `iter(loader)` is an independent PatchIterator with its own position and threads; several may run at once. The
    memory of a batch is reused once nothing refers to it, so batches can be kept. At most `threads` + 3 batches are
    held besides those. Positional reads also hold the tiles of coming batches: up to 64 MiB, or two batches' if larger.

    Args:
        dataset: the dataset to read.
        batch_size: samples per batch, of this rank.
        rank, world_size: this rank, and the number of ranks.
        start: position of the first sample in the stream; None: the start of the dataset's current epoch.
        epochs: number of epochs to read, from the dataset's current epoch, or from sample 0 if `start` is given; the
            last batch may be short, but has the same size on all ranks. None: no end.
        io: page advice ("mmap"), positional reads ("pread"), or what suits the storage ("auto").
        readahead: batches to request ahead of time; None: as many as hold 256 samples, at least 2.
        threads: number of threads that gather batches.
        pin_memory: return batches in page-locked memory, for copies to a GPU; None: if CUDA is available.
        drop_pages: release pages after use, for systems that count the page cache against a memory limit.

    Raises:
        TypeError: the dataset is not a PatchDataset.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        dataset: PatchDataset,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        start: int | None = None,
        epochs: int | None = None,
        io: Io = "auto",
        readahead: int | None = None,
        threads: int = 2,
        pin_memory: bool | None = None,
        drop_pages: bool = False,
    ) -> None:
        if not isinstance(dataset, PatchDataset):
            raise TypeError(
                f"dataset: expected a PatchDataset, got {type(dataset).__name__}; build one dataset of all images, "
                "use one PatchLoader per PatchDataset, or wrap other datasets in torch's DataLoader"
            )
        self.dataset = dataset
        self.batch_size = _whole("batch_size", batch_size, 1)
        self.world_size = _whole("world_size", world_size, 1)
        self.rank = _whole("rank", rank, 0, self.world_size - 1, f"0 to world_size - 1 = {self.world_size - 1}")
        self.start = None if start is None else _whole("start", start, 0)
        self.epochs = None if epochs is None else _whole("epochs", epochs, 1, MAX_POSITION // len(dataset))
        require("io", '"auto", "mmap" or "pread"', io, io in ("auto", "mmap", "pread"))
        self.readahead = (
            default_readahead(self.batch_size)
            if readahead is None
            else _whole("readahead", readahead, 0, MAX_READAHEAD)
        )
        self.threads = _whole("threads", threads, 1)
        self.io, self.drop_pages = io, bool(drop_pages)
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else bool(pin_memory)
        self._resumed: int | None = None  # the position from load_state_dict
        self._newest: Position | None = None  # of the newest iterator
        self._local = _ProcessState(self)

    def __len__(self) -> int:
        """Return the number of batches; TypeError for an endless stream."""
        if self.epochs is None:
            raise TypeError("a PatchLoader without epochs has no length")
        return len(self._steps())

    def __iter__(self) -> PatchIterator:
        """Return an iterator from the start on, or from a loaded position on, independent of other iterators.

        If the dataset's current epoch starts after the loaded position, the iterator starts with the epoch.
        """
        if self._local.process != os.getpid():
            self._local = _ProcessState(self)  # forked: a thread of the parent may have held a lock
        data, steps = self.dataset, self._steps()
        reader = open_reader(data.shards, data.scale, data.lr_patch, self.io, self.drop_pages, READ_BUFFERS)
        # Threads hold the plan rather than the dataset: a user's subclass may refer to the iterator.
        draw = partial(draw_crops, data.plan, len(data))
        allocate = self._local.buffers.allocate
        pipeline = Pipeline(reader, iter(steps), draw, self.readahead, self.threads, allocate)
        self._newest = Position(steps.first)
        return PatchIterator(data, pipeline, reader, self._local.stats, self._newest)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._local = _ProcessState(self)

    def stats(self) -> Stats:
        """Return the totals of all iterators so far."""
        return self._local.stats.total

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream after the last batch of the newest iterator.

        It is valid for any batch size and number of ranks. Besides `sample` it holds what defines the stream: `length`,
        `seed`, `scale`, `lr_patch`, `augment`, and `datasets`, a list of SHA-256 digests of the images' pixels, the
        same for any container and number of shards.
        """
        return stream_of(self.dataset).save(self._steps().first if self._newest is None else self._newest.sample)

    def load_state_dict(self, state: Mapping[str, Any], *, allow_other_dataset: bool = False) -> None:
        """Let the next iterator resume at a saved position.

        Args:
            state: from state_dict(); fully validated, so it may come from an untrusted file.
            allow_other_dataset: accept a position in a stream of other datasets, even of another length.

        Raises:
            ShardsError: not a position in this stream; the message names every difference.
        """
        self._resumed = stream_of(self.dataset).load(state, allow_other_dataset)
        self._newest = None

    def _steps(self) -> RankSteps:
        """Return the steps of an iterator that starts now."""
        begin = self.dataset.epoch * len(self.dataset) if self.start is None else 0
        first = begin if self.start is None else self.start
        if self._resumed is not None:
            first = max(self._resumed, begin)
        end = MAX_POSITION if self.epochs is None else begin + self.epochs * len(self.dataset)
        return RankSteps(first, min(end, MAX_POSITION), self.batch_size, self.rank, self.world_size)


class _ProcessState:
    """What the iterators of a loader share within a process."""

    def __init__(self, loader: PatchLoader) -> None:
        self.process = os.getpid()
        self.buffers = BatchBuffers(loader.pin_memory, spare=2 * (loader.threads + 3))
        self.stats = SharedStats()


def to_float(batch: LrHr, device: torch.device | str) -> LrHr:
    """Return a batch on a device as float32 in [0, 1], channels last; it is copied as bytes."""
    lr, hr = (part.to(device, non_blocking=True).float().div_(255) for part in batch)
    return lr, hr


def _whole(name: str, value: SupportsIndex, least: int, most: int = MAX_POSITION, expected: str = "") -> int:
    """Return an integer of any type as int; raise ValueError if it is not one or out of bounds."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected a whole number, got {value!r}") from None
    if not expected:
        expected = f"{least} or more" if number < least else f"at most {most}"
    require(name, expected, value, least <= number <= most)
    return number
