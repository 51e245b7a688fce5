"""Crops of one plane, in the plane's own pixels."""

from dataclasses import dataclass

from loader.pixels.tiles import Ints


@dataclass(frozen=True)
class PlaneCrops:
    """Square crops of one size out of one plane.

    level: 1 for HR, the scale for LR. side: of each crop, in pixels of the plane. image, top, left: int64 (n,), image
    numbers and corners in pixels of the plane. transform: int64 (n,), 0 to 7, see `loader.pixels.tiles.transformed`.
    """

    level: int
    side: int
    image: Ints
    top: Ints
    left: Ints
    transform: Ints

    def __len__(self) -> int:
        return len(self.image)
