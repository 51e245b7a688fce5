"""PatchIterator: one pass through a stream of batches, which knows its own place."""

import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from loader.ahead.footprint import ReadCounts
from loader.ahead.pipeline import Pipeline
from loader.ahead.reader import Reader
from loader.dataset import LrHr, PatchDataset
from loader.stream.position import Stream
from loader.stream.stats import SharedStats
from loader.stream.steps import Step


class Position:
    """Where an iterator is: its loader looks here, for a loader that knew its iterators would keep them alive."""

    def __init__(self, sample: int) -> None:
        self.sample = sample


class PatchIterator(Iterator[LrHr]):
    """Batches of a PatchLoader, from one place on; made by `iter(loader)`.

    Its threads end when it is exhausted, at an error, when it is closed, and when it is dropped, in whatever way. Only
    `close` waits for them. It serves one thread at a time, in the process that asked for the first batch.
    """

    def __init__(
        self,
        data: PatchDataset,
        pipeline: Pipeline[Step, Tensor],
        reader: Reader,
        stats: SharedStats,
        position: Position,
    ) -> None:
        self._data, self._pipeline, self._reader = data, pipeline, reader
        self._stats, self._position, self._counts = stats, position, ReadCounts()

    def __iter__(self) -> "PatchIterator":
        return self

    def __next__(self) -> LrHr:
        """The next batch. Raises what went wrong while it was made, once; there is nothing more then."""
        before = time.perf_counter()
        step, lr, hr = next(self._pipeline)
        counts = self._reader.counts
        self._stats.add(time.perf_counter() - before, counts, self._counts)
        self._counts = counts
        self._position.sample = step.after
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
        return stream_of(self._data).save(self._position.sample)


def stream_of(data: PatchDataset) -> Stream:
    """The stream of samples of a dataset; its images are looked at once."""
    datasets = (data.shards.identity(data.scale),)
    return Stream(len(data), data.seed, data.scale, data.lr_patch, bool(data.augment), datasets)
