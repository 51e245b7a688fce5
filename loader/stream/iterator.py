"""PatchIterator: one pass through a stream of batches, with its own position."""

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
    """The position of an iterator, shared with its loader, which must not keep the iterator itself alive."""

    def __init__(self, sample: int) -> None:
        self.sample = sample


class PatchIterator(Iterator[LrHr]):
    """Batches of a PatchLoader from one position on; made by `iter(loader)`.

    Its threads stop when it is exhausted, fails, is closed or is dropped; only `close` waits for them. Use it from one
    thread at a time, in the process that requested the first batch.
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
        """Return the next batch. An error in making it is raised once; then the iterator is exhausted."""
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
        """Stop the threads and wait for them; the iterator is then exhausted."""
        self._pipeline.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream after the last batch returned; see PatchLoader.state_dict."""
        return stream_of(self._data).save(self._position.sample)


def stream_of(data: PatchDataset) -> Stream:
    """Return the stream of samples of a dataset."""
    datasets = (data.shards.identity(data.scale),)
    return Stream(len(data), data.seed, data.scale, data.lr_patch, bool(data.augment), datasets)
