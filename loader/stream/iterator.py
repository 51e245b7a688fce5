"""PatchIterator: one pass through a stream of batches, which knows its own place."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from loader.ahead.footprint import Asked
from loader.ahead.pipeline import Pipeline
from loader.ahead.reader import Reader
from loader.dataset import Pair, PatchDataset
from loader.plan import Crops, Plan
from loader.stream.position import Stream


@dataclass(frozen=True)
class Stats:
    """What a PatchLoader did so far: batches given, seconds its user waited for them, bytes and requests asked for."""

    batches: int = 0
    waited: float = 0.0
    bytes_asked: int = 0
    requests: int = 0


class Counts:
    """The Stats of all iterators of a PatchLoader together."""

    def __init__(self) -> None:
        self.stats = Stats()
        self._guard = threading.Lock()

    def add(self, waited: float, asked: Asked, before: Asked) -> None:
        """Count a batch."""
        with self._guard:
            now = self.stats
            self.stats = replace(
                now,
                batches=now.batches + 1,
                waited=now.waited + waited,
                bytes_asked=now.bytes_asked + asked.bytes - before.bytes,
                requests=now.requests + asked.requests - before.requests,
            )


@dataclass(frozen=True)
class Share:
    """Which samples of a stream a rank gets: those from `first` to `end`, in steps of `batch_size` for each rank."""

    first: int
    end: int
    batch_size: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        whole, rest = divmod(max(self.end - self.first, 0), self.batch_size * self.world_size)
        return whole + (rest >= self.world_size)

    def steps(self) -> Iterator["Step"]:
        """The batches of this rank, in order; the last one may be short, but equally so for all ranks."""
        first, together = self.first, self.batch_size * self.world_size
        while self.end - first >= self.world_size:
            count = min(self.batch_size, (self.end - first) // self.world_size)
            yield Step(first + self.rank * count, count, min(first + together, self.end))
            first += together


@dataclass(frozen=True)
class Step:
    """The samples of one batch: global number of the first one, how many, and where the stream is after this step."""

    first: int
    count: int
    after: int


class Place:
    """Where an iterator is: its loader looks here, for a loader that knew its iterators would keep them alive."""

    def __init__(self, sample: int) -> None:
        self.sample = sample


class PatchIterator(Iterator[Pair]):
    """Batches of a PatchLoader, from one place on; made by `iter(loader)`.

    Its threads end when it is exhausted, at an error, when it is closed, and when it is dropped, in whatever way. Only
    `close` waits for them. It serves one thread at a time, in the process that asked for the first batch.
    """

    def __init__(
        self, data: PatchDataset, pipeline: Pipeline[Step, Tensor], reader: Reader, counts: Counts, place: Place
    ) -> None:
        self._data, self._pipeline, self._reader = data, pipeline, reader
        self._counts, self._place, self._asked = counts, place, Asked()

    def __iter__(self) -> "PatchIterator":
        return self

    def __next__(self) -> Pair:
        """The next batch. Raises what went wrong while it was made, once; there is nothing more then."""
        before = time.perf_counter()
        step, lr, hr = next(self._pipeline)
        asked = self._reader.asked
        self._counts.add(time.perf_counter() - before, asked, self._asked)
        self._asked = asked
        self._place.sample = step.after
        return lr, hr

    def __enter__(self) -> "PatchIterator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, and wait until they have; there are no more batches then."""
        self._pipeline.close()

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream after the last batch that this iterator gave; see PatchLoader.state_dict."""
        return stream_of(self._data).save(self._place.sample)


def stream_of(data: PatchDataset) -> Stream:
    """The stream of samples of a dataset; its images are looked at once."""
    datasets = (data.shards.identity(data.scale),)
    return Stream(len(data), data.seed, data.scale, data.lr_patch, bool(data.augment), datasets)


def crops_of(plan: Plan, length: int, step: Step) -> Crops:
    """The crops of consecutive global samples, which may lie in several epochs of that length."""
    parts, first, left = [], step.first, step.count
    while left:
        epoch, n = divmod(first, length)
        count = min(left, length - n)
        parts.append(plan.crops(epoch, np.arange(n, n + count)))
        first, left = first + count, left - count
    if len(parts) == 1:
        return parts[0]
    return Crops(*(np.concatenate([vars(part)[key] for part in parts]) for key in vars(parts[0])))
