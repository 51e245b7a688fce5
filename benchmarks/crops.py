"""The crops to read, and the dataset they come from: the same for every way."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loader import PatchDataset
from loader.ahead.footprint import PatchSize, footprint
from loader.pixels.byte_ranges import Ranges, crop_ranges, pages, tile_rows
from loader.plan import Crops, Plan

PAGE = 4096
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Task:
    """What to read: crops of `lr_patch` LR pixels at a scale, for these sample numbers, in batches.

    folder: contains the dataset as `shards`, and the rivals' files. cores: those to run on; None: all. in_flight:
    concurrent requests, for ways that can set it; 0: their default.
    """

    folder: Path
    scale: int
    lr_patch: int
    batch_size: int
    numbers: Ints
    cores: tuple[int, ...] | None = None
    in_flight: int = 0

    @property
    def sides(self) -> tuple[int, int]:
        """Sides of the LR and HR crops in pixels."""
        return self.lr_patch, self.lr_patch * self.scale

    def dataset(self, augment: bool = False) -> PatchDataset:
        """The dataset, whose sample k is sample `numbers[k]` of the plan."""
        return PickedDataset(self, augment)

    def crops(self) -> Crops:
        """Positions of the samples."""
        return self.dataset().plan.crops(0, np.arange(len(self.numbers)))


class Picked(Plan):
    """A selection from a plan: sample k is sample numbers[k] of the whole plan."""

    def __init__(
        self, height: ArrayLike, width: ArrayLike, patch: int, seed: int, augment: bool, numbers: Ints
    ) -> None:
        super().__init__(height, width, patch, seed, augment)
        self._numbers = numbers

    def crops(self, epoch: int, samples: ArrayLike) -> Crops:
        """See Plan."""
        return super().crops(epoch, self._numbers[np.asarray(samples, np.int64)])


class PickedDataset(PatchDataset):
    """A dataset over such a plan; benchmarks draw the same crops repeatedly."""

    def __init__(self, task: Task, augment: bool) -> None:
        count, self.numbers = len(task.numbers), task.numbers
        super().__init__(
            task.folder / "shards", task.scale, task.lr_patch, count, augment=augment, too_small="skip", fixed=True
        )

    @property
    def plan(self) -> Plan:
        """The selection from the plan."""
        if self._plan is None:
            sizes = self.shards.index.sizes(self.scale)
            self._plan = Picked(*sizes, self.lr_patch, self.seed, self.augment, self.numbers)
        return self._plan


def touched(data: PatchDataset, crops: Crops) -> Ranges:
    """Return the byte ranges that crops touch in both planes, in whole pages, one for each row of tiles."""
    return pages(footprint(data.shards.index, PatchSize(data.scale, data.lr_patch).in_planes(crops)))


def disjoint(data: PatchDataset, most: int) -> Ints:
    """Return up to `most` sample numbers that share no pages; those that are the first in an image come first.

    If the system reads ahead, one crop brings half its image into the page cache. Only crops of images not visited
    before then show what a dataset larger than memory costs. There are `images_in` such samples.
    """
    used = [np.zeros(-(-shard.bytes // PAGE), bool) for shard in data.shards.index.shards]
    picked: list[int] = []
    block = 1024
    for first in range(0, 50 * most, block):
        numbers = np.arange(first, first + block)
        crops = data.plan.crops(0, numbers)
        for number, spans in zip(numbers.tolist(), spans_of(data, crops, used), strict=True):
            if len(picked) < most and not any(span.any() for span in spans):
                picked.append(number)
                for span in spans:
                    span[:] = True
    image = data.plan.crops(0, picked).image
    _, visits = np.unique(image, return_index=True)
    later = np.ones(len(picked), bool)
    later[visits] = False
    return np.concatenate([np.array(picked)[np.sort(visits)], np.array(picked)[later]])


def spans_of(data: PatchDataset, crops: Crops, pages_of: list[NDArray[np.bool_]]) -> list[list[NDArray[np.bool_]]]:
    """Yield for each crop the slices that it touches of the shards' page flags."""
    spans: list[list[NDArray[np.bool_]]] = [[] for _ in crops.image]
    index = data.shards.index
    for plane in PatchSize(data.scale, data.lr_patch).in_planes(crops):
        ranges = pages(crop_ranges(index, plane))
        for crop, (shard, start, stop) in zip(tile_rows(index, plane).crop.tolist(), ranges, strict=True):
            spans[crop].append(pages_of[shard][start // PAGE : stop // PAGE])
    return spans


def images_in(task: Task) -> int:
    """Return the number of images that the samples come from."""
    return len(np.unique(task.crops().image))
