"""One shard: the images of its plan decoded, shrunk, cut into tiles and written, one at a time.

Which bytes it holds follows from the sources and the recipe alone: shards can be built anywhere, in any order.
"""

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from loader import format as fmt
from loader.format import HR, Shard, ShardsError
from loader.tiles import Pixels, split
from prep.images import ImageError, ImageFile, decode, lr_fits
from prep.imresize import Border, Rounding, imresize
from prep.writers import open_writer

PART = ".part"  # the ending of what is not complete yet
ROUNDINGS: dict[str, Rounding] = {"matlab-uint8": "uint8", "matlab-double": "double"}


@dataclass(frozen=True)
class Recipe:
    """What the bytes of a dataset depend on besides its images."""

    scales: tuple[int, ...]
    container: str
    tile: int
    images_per_shard: int
    resize: str
    border: Border
    given_lr: bool = False

    def __post_init__(self) -> None:
        low, high = fmt.TILES
        _need("scale", f"some of {fmt.SCALES}, each once", self.scales, _rising(self.scales, fmt.SCALES))
        _need(
            "tile", f"a multiple of 16 from {low} to {high}", self.tile, low <= self.tile <= high and not self.tile % 16
        )
        _need("images per shard", "1 or more", self.images_per_shard, self.images_per_shard >= 1)


@dataclass(frozen=True)
class Source:
    """One image of the dataset to be: its HR file, and by scale its LR files where they are given."""

    image: ImageFile
    lr: dict[int, ImageFile] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardPlan:
    """A shard to be built, apart from all others."""

    number: int
    sources: tuple[Source, ...]
    recipe: Recipe
    folder: Path

    @property
    def file(self) -> str:
        """The shard's name once it is complete."""
        return fmt.shard_file(self.number, self.recipe.container)

    @property
    def part(self) -> Path:
        """Where it is built."""
        return self.folder / (self.file + PART)


@dataclass(frozen=True)
class Run:
    """The pixels of one image in one plane: where they were put, and from which file (None: made from HR)."""

    offset: int
    crc32: int
    source: str | None
    source_sha256: str | None


@dataclass(frozen=True)
class ImageRecord:
    """One image of a shard: its HR size and its run in each plane."""

    name: str
    height: int
    width: int
    runs: dict[int, Run]


@dataclass(frozen=True)
class ShardRecord:
    """A shard that was built (None: no image was left for it), its images in order, and what was wrong with others."""

    shard: Shard | None
    images: list[ImageRecord]
    bad: list[str]


def build_shard(plan: ShardPlan, proceed: Callable[[bool], bool]) -> ShardRecord:
    """Write one shard to its temporary file, an image at a time.

    `proceed` is told of each image whether it was good, and answers whether to go on; without it, no shard is kept.
    """
    recipe = plan.recipe
    images: list[ImageRecord] = []
    bad: list[str] = []
    smallest = min(fmt.plane_tile(recipe.tile, scale) for scale in (HR, *recipe.scales)) ** 2 * fmt.CHANNELS
    plan.part.unlink(missing_ok=True)
    with open_writer(recipe.container, plan.part, recipe.scales, smallest) as writer:
        for source in plan.sources:
            try:
                planes = _planes(source, recipe)
            except ImageError as error:
                bad.append(str(error))
                if not proceed(False):
                    break
                continue
            runs = {}
            for scale, (pixels, name, digest) in planes.items():
                height, width = pixels.shape[:2]
                tiles = split(pixels, fmt.plane_tile(recipe.tile, scale))
                offset = writer.write(scale, source.image.stem, height, width, tiles)
                runs[scale] = Run(offset, zlib.crc32(tiles.data), name, digest)
            height, width = planes[HR][0].shape[:2]
            images.append(ImageRecord(source.image.stem, height, width, runs))
            if not proceed(True):
                break
    if not images:
        plan.part.unlink()
        return ShardRecord(None, images, bad)
    with plan.part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return ShardRecord(Shard(plan.file, file.tell(), digest), images, bad)


_Planes = dict[int, tuple[Pixels, str | None, str | None]]


def _planes(source: Source, recipe: Recipe) -> _Planes:
    """The pixels of each plane of an image, with name and digest of the file they came from, by scale."""
    hr, digest = _read(source.image)
    height, width = hr.shape[:2]
    planes: _Planes = {HR: (hr, source.image.name, digest)}
    for scale in recipe.scales:
        whole = (height // scale, width // scale)
        if 0 in whole:
            expected = f"at least {scale} × {scale} pixels"
            raise ImageError(f"{source.image.path}: expected {expected}, got {height} × {width}")
        if scale not in source.lr:
            part = hr[: whole[0] * scale, : whole[1] * scale]
            lr = imresize(part, scale, rounding=ROUNDINGS[recipe.resize], border=recipe.border)
            planes[scale] = (lr, None, None)
            continue
        file = source.lr[scale]
        lr, digest = _read(file)
        if not lr_fits((height, width), lr.shape[:2], scale):
            got = f"{lr.shape[0]} × {lr.shape[1]}"
            raise ImageError(f"{file.path}: expected {whole[0]} × {whole[1]} for HR of {height} × {width}, got {got}")
        planes[scale] = (lr[: whole[0], : whole[1]], file.name, digest)
    return planes


def _read(file: ImageFile) -> tuple[Pixels, str]:
    try:
        data = file.path.read_bytes()
    except OSError as error:
        raise ImageError(f"{file.path}: expected a readable file, got {error.strerror}") from None
    return decode(data, str(file.path)), hashlib.sha256(data).hexdigest()


def _rising(values: tuple[int, ...], allowed: tuple[int, ...]) -> bool:
    return bool(values) and values == tuple(sorted(set(values) & set(allowed)))


def _need(name: str, expected: str, got: object, holds: bool) -> None:
    if not holds:
        raise ShardsError(f"{name}: expected {expected}, got {got}")
