"""Footprints: the bytes of storage that a batch of crops touches in both planes."""

from dataclasses import dataclass

from loader.format.layout import HR, Index
from loader.pixels.byte_ranges import Ranges, concatenated, crop_ranges
from loader.pixels.crops import PlaneCrops
from loader.plan import Crops

BatchCrops = tuple[PlaneCrops, PlaneCrops]  # of LR and of HR


@dataclass(frozen=True)
class PatchSize:
    """The size of crops: `lr` × `lr` pixels in the LR plane of `scale`, `hr` × `hr` pixels in HR."""

    scale: int
    lr: int

    @property
    def hr(self) -> int:
        """Side of the HR crop."""
        return self.lr * self.scale

    def in_planes(self, crops: Crops) -> BatchCrops:
        """Return crops drawn in LR pixels as crops of the LR plane and of HR."""
        image, top, left, transform = crops.image, crops.top, crops.left, crops.transform
        return (
            PlaneCrops(self.scale, self.lr, image, top, left, transform),
            PlaneCrops(HR, self.hr, image, top * self.scale, left * self.scale, transform),
        )


def footprint(index: Index, crops: BatchCrops) -> Ranges:
    """Return the bytes that a batch touches."""
    return concatenated([crop_ranges(index, plane) for plane in crops])


@dataclass(frozen=True)
class ReadCounts:
    """Totals of what was requested from storage."""

    bytes: int = 0
    requests: int = 0

    def __add__(self, ranges: Ranges) -> "ReadCounts":
        return ReadCounts(self.bytes + ranges.bytes, self.requests + len(ranges))
