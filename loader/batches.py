"""PatchLoader: whole batches of a PatchDataset, asked of the storage and gathered ahead of time by threads."""

import operator
import os
from collections.abc import Mapping
from functools import partial
from typing import Any, SupportsIndex

import torch

from loader.ahead.budget import Room
from loader.ahead.pipeline import Pipeline, default_readahead
from loader.ahead.reader import Io, open_reader
from loader.arguments import require
from loader.dataset import Pair, PatchDataset
from loader.stream.buffers import Memory
from loader.stream.iterator import Counts, PatchIterator, Place, Share, Stats, crops_of, stream_of
from loader.stream.position import MOST_SAMPLES

MOST_AHEAD = 1 << 16  # batches


class PatchLoader:
    """Batches (lr, hr) of a PatchDataset, for ever: uint8 (n, 3, p, p) and (n, 3, p·scale, p·scale), channels last.

    Global sample g is sample g % L of epoch g // L of the dataset, with L = len(dataset). The stream is read in order,
    since the plan is random already. It begins with the dataset's own epoch (0 until `set_epoch`). Step k of all ranks
    together holds the samples from start + k·batch_size·world_size on, in order of rank, however many ranks there are.

    Each `iter(loader)` is a PatchIterator with a place of its own; several may run at once. Batches are made ahead of
    time by its threads, which end with it. A batch's memory is used again once nothing refers to it; batches that are
    kept stay as they are, and keep nothing waiting. At most `threads` + 3 batches are in memory besides those. With
    positional reads, the tiles that coming batches touch are too: at most 64 MiB of them, or two batches' where those
    take more.

    Args:
        dataset: what to read.
        batch_size: samples in a batch, of this rank.
        rank, world_size: which share of each step to give, out of how many.
        start: global number of the first sample; None: where the dataset's epoch starts, when iteration begins.
        epochs: end after so many, counted from the dataset's epoch, or from sample 0 where `start` is given; the last
            step may be short, but is equally so for all ranks. None: never end.
        io: how to ask for data: page advice ("mmap"), positional reads ("pread"), or what suits the storage ("auto").
        readahead: batches to ask the storage for before their turn; None: as many as hold 256 samples, at least 2.
        threads: that gather batches.
        pin_memory: give batches in page-locked memory, for copies to a GPU; None: where there is CUDA.
        drop_pages: let go of pages after use, where the page cache counts against a limit of memory.

    Raises:
        TypeError: the dataset is no PatchDataset.
        ValueError: an argument is out of its range.
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
                f"dataset: expected a PatchDataset, got {type(dataset).__name__}; build one dataset of all images, or "
                "read each PatchDataset with a PatchLoader of its own, or wrap others in torch's DataLoader"
            )
        self.dataset = dataset
        self.batch_size = _whole("batch_size", batch_size, 1)
        self.world_size = _whole("world_size", world_size, 1)
        self.rank = _whole("rank", rank, 0, self.world_size - 1, f"0 to world_size - 1 = {self.world_size - 1}")
        self.start = None if start is None else _whole("start", start, 0)
        self.epochs = None if epochs is None else _whole("epochs", epochs, 1, MOST_SAMPLES // len(dataset))
        require("io", '"auto", "mmap" or "pread"', io, io in ("auto", "mmap", "pread"))
        self.readahead = (
            default_readahead(self.batch_size) if readahead is None else _whole("readahead", readahead, 0, MOST_AHEAD)
        )
        self.threads = _whole("threads", threads, 1)
        self.io, self.drop_pages = io, bool(drop_pages)
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else bool(pin_memory)
        self._resumed: int | None = None  # where another loader was
        self._newest: Place | None = None  # that of the newest iterator
        self._own = _Own(self)

    def __len__(self) -> int:
        """Batches from the start to the end; TypeError where there is none."""
        if self.epochs is None:
            raise TypeError("a PatchLoader without epochs has no length")
        return len(self._share())

    def __iter__(self) -> PatchIterator:
        """Begin at the start, or where a state was loaded that is later; what other iterators do does not matter."""
        if self._own.process != os.getpid():
            self._own = _Own(self)  # this process was forked: a thread that is not here may hold a lock
        data, share, room = self.dataset, self._share(), Room()
        reader = open_reader(data.shards, data.scale, data.lr_patch, self.io, self.drop_pages, room)
        # What threads refer to does not lead back to the dataset: that may be the user's, and lead to the iterator.
        draw = partial(crops_of, data.plan, len(data))
        take = self._own.memory.take
        pipeline = Pipeline(reader, share.steps(), draw, self.readahead, self.threads, take, room)
        self._newest = Place(share.first)
        return PatchIterator(data, pipeline, reader, self._own.counts, self._newest)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_own"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._own = _Own(self)

    def stats(self) -> Stats:
        """What was done so far, by all iterators together."""
        return self._own.counts.stats

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream after the last batch that the newest iterator gave.

        It fits any batch size and number of ranks. Besides `sample` it holds what decides the stream: `length`, `seed`,
        `scale`, `lr_patch`, `augment`, and `datasets`, a list of SHA-256 digests of the images' pixels, whatever the
        container and the number of shards.
        """
        return stream_of(self.dataset).save(self._share().first if self._newest is None else self._newest.sample)

    def load_state_dict(self, state: Mapping[str, Any], *, allow_other_dataset: bool = False) -> None:
        """Let the next iterator begin where another loader was.

        Args:
            state: what state_dict() gave. It is checked as if a stranger had made it.
            allow_other_dataset: go on at that sample, though in another dataset, of another length perhaps.

        Raises:
            ShardsError: it is no place in this stream; each difference is named.
        """
        self._resumed = stream_of(self.dataset).load(state, allow_other_dataset)
        self._newest = None

    def _share(self) -> Share:
        """What an iterator that begins now gives."""
        begin = self.dataset.epoch * len(self.dataset) if self.start is None else 0
        first = begin if self.start is None else self.start
        if self._resumed is not None:
            first = max(self._resumed, begin)
        end = MOST_SAMPLES if self.epochs is None else begin + self.epochs * len(self.dataset)
        return Share(first, min(end, MOST_SAMPLES), self.batch_size, self.rank, self.world_size)


class _Own:
    """What the iterators of a loader share within one process."""

    def __init__(self, loader: PatchLoader) -> None:
        self.process = os.getpid()
        self.memory = Memory(loader.pin_memory, spare=2 * (loader.threads + 3))
        self.counts = Counts()


def to_float(batch: Pair, device: torch.device | str) -> Pair:
    """A batch on a device, as float32 in [0, 1]; it travels as bytes, and keeps its channels-last memory."""
    lr, hr = (part.to(device, non_blocking=True).float().div_(255) for part in batch)
    return lr, hr


def _whole(name: str, value: SupportsIndex, least: int, most: int = MOST_SAMPLES, expected: str = "") -> int:
    """A whole number of any type, within bounds; ValueError naming the argument for anything else."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected a whole number, got {value!r}") from None
    if not expected:
        expected = f"{least} or more" if number < least else f"at most {most}"
    require(name, expected, value, least <= number <= most)
    return number
