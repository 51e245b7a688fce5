"""How a stream of samples is cut into batches, for one rank of several."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from loader.plan import Crops, Plan, concatenated


@dataclass(frozen=True)
class Step:
    """The batch of one rank in one step: its first sample, how many, and the stream's position after the step."""

    first: int
    count: int
    after: int


@dataclass(frozen=True)
class RankSteps:
    """The steps of a rank: samples `first` to `end` of the stream, `batch_size` for each rank in turn."""

    first: int
    end: int
    batch_size: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        whole, rest = divmod(max(self.end - self.first, 0), self.batch_size * self.world_size)
        return whole + (rest >= self.world_size)

    def __iter__(self) -> Iterator[Step]:
        """Yield the steps in order; the last batch may be short, but has the same size on all ranks."""
        first, per_step = self.first, self.batch_size * self.world_size
        while self.end - first >= self.world_size:
            count = min(self.batch_size, (self.end - first) // self.world_size)
            yield Step(first + self.rank * count, count, min(first + per_step, self.end))
            first += per_step


def draw_crops(plan: Plan, length: int, step: Step) -> Crops:
    """Return the crops of a step, whose samples may lie in several epochs of `length` samples."""
    parts, first, left = [], step.first, step.count
    while left:
        epoch, n = divmod(first, length)
        count = min(left, length - n)
        parts.append(plan.crops(epoch, np.arange(n, n + count)))
        first, left = first + count, left - count
    return parts[0] if len(parts) == 1 else concatenated(parts)
