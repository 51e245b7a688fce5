"""The recipe of a dataset: everything its bytes depend on, apart from its images."""

from dataclasses import dataclass

from loader.errors import ShardsError
from loader.format import layout as fmt
from loader.format.layout import HR, LrOrigin
from loader.resize.imresize import Border
from prep.images.decode import MAX_PIXELS


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How images become shards.

    Without scales, HR is stored alone. Images of more than `max_pixels` pixels are refused.
    """

    scales: tuple[int, ...]
    container: str
    tile: int
    images_per_shard: int
    resize: str
    border: Border
    given_lr: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        low, high = fmt.TILES
        _need("scale", f"some of {fmt.SCALES}, each once", self.scales, _rising(self.scales, fmt.SCALES))
        _need("LR", "scales for given LR", "none", bool(self.scales) or not self.given_lr)
        _need(
            "tile", f"a multiple of 16 from {low} to {high}", self.tile, low <= self.tile <= high and not self.tile % 16
        )
        _need("images per shard", "1 or more", self.images_per_shard, self.images_per_shard >= 1)
        _need("max pixels", "1 or more", self.max_pixels, self.max_pixels >= 1)

    @property
    def tiles(self) -> dict[int, int]:
        """The tile size of each plane, by level."""
        return {level: fmt.plane_tile(self.tile, level) for level in (HR, *self.scales)}

    @property
    def lr(self) -> LrOrigin:
        """Where LR comes from, as the index records it."""
        if not self.scales:
            return LrOrigin("none")
        return LrOrigin("given") if self.given_lr else LrOrigin("imresize", self.resize, self.border)


def _rising(values: tuple[int, ...], allowed: tuple[int, ...]) -> bool:
    return values == tuple(sorted(set(values) & set(allowed)))


def _need(name: str, expected: str, got: object, holds: bool) -> None:
    if not holds:
        raise ShardsError(f"{name}: expected {expected}, got {got}")
