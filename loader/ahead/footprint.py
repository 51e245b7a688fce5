"""The crops of a batch in each plane of a dataset, and the bytes that they touch there."""

from dataclasses import dataclass

import numpy as np

from loader.format.layout import HR
from loader.pixels.byte_ranges import Ranges, TileRows, tile_rows
from loader.pixels.shards import Shards
from loader.pixels.tiles import Pixels
from loader.plan import Crops


@dataclass(frozen=True)
class Plane:
    """The crops of one plane: `zoom` plane pixels to an LR pixel, `side` plane pixels to a crop."""

    shards: Shards
    scale: int
    zoom: int
    side: int

    def tile_rows(self, crops: Crops) -> TileRows:
        """What the crops touch in this plane."""
        corner = crops.top * self.zoom, crops.left * self.zoom
        return tile_rows(self.shards.index, self.scale, crops.image, *corner, self.side)

    def ranges(self, crops: Crops) -> Ranges:
        """The same as bytes of shards."""
        touched = self.tile_rows(crops)
        image = crops.image[touched.crop]
        offset = self.shards.index.planes[self.scale].offset[image]
        return Ranges(self.shards.index.shard[image], offset + touched.start, offset + touched.stop)

    def gather(self, crops: Crops, out: Pixels) -> None:
        """Copy the crops out of the mapped files."""
        corner = crops.top * self.zoom, crops.left * self.zoom
        self.shards.gather(self.scale, crops.image, *corner, out, crops.transform)


def batch_ranges(planes: tuple[Plane, ...], crops: Crops) -> Ranges:
    """The bytes that crops touch in all planes."""
    each = [plane.ranges(crops) for plane in planes]
    columns = ([getattr(ranges, key) for ranges in each] for key in ("shard", "start", "stop"))
    return Ranges(*map(np.concatenate, columns))


def planes_of(shards: Shards, scale: int, patch: int) -> tuple[Plane, Plane]:
    """LR of a scale and HR, with LR patches of `patch` pixels."""
    return Plane(shards, scale, 1, patch), Plane(shards, HR, scale, patch * scale)


@dataclass(frozen=True)
class Asked:
    """How much was asked of the storage: bytes, in so many requests."""

    bytes: int = 0
    requests: int = 0

    def __add__(self, ranges: Ranges) -> "Asked":
        return Asked(self.bytes + ranges.bytes, self.requests + len(ranges))
