"""One shard: the images of its plan decoded, shrunk, cut into tiles and written, one at a time.

Which bytes it holds follows from the sources and the recipe alone: shards can be built anywhere, in any order.
"""

import errno
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from loader.errors import ShardsError, one_line
from loader.format import layout as fmt
from loader.format.layout import HR, Shard
from loader.pixels.tiles import Pixels, split
from loader.resize.imresize import Border, Rounding, imresize
from loader.system.safefile import open_own
from prep.images.decode import MAX_PIXELS, decode, read_file
from prep.images.faults import ImageError, StorageError, explain, shown
from prep.images.find import ImageFile
from prep.images.pair import lr_fits
from prep.shard.writers import open_writer

PART = ".part"  # the ending of what is not complete yet
BLOCK = 1 << 20  # bytes read at once when a file is checked
Stamp = tuple[int, int] | None  # length and time of the last change (ns) of a file, None where it cannot be had
ROUNDINGS: dict[str, Rounding] = {"matlab-uint8": "uint8", "matlab-double": "double"}


@dataclass(frozen=True)
class Recipe:
    """What the bytes of a dataset depend on besides its images.

    Without scales there is no LR: HR is stored alone. Images of more than `max_pixels` are refused.
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
        _need("LR", "scales for LR that is given", "none", bool(self.scales) or not self.given_lr)
        _need(
            "tile", f"a multiple of 16 from {low} to {high}", self.tile, low <= self.tile <= high and not self.tile % 16
        )
        _need("images per shard", "1 or more", self.images_per_shard, self.images_per_shard >= 1)
        _need("max pixels", "1 or more", self.max_pixels, self.max_pixels >= 1)

    @property
    def tiles(self) -> dict[int, int]:
        """The side of the tiles of each plane, by scale."""
        return {scale: fmt.plane_tile(self.tile, scale) for scale in (HR, *self.scales)}


@dataclass(frozen=True)
class Source:
    """One image of the dataset to be: its HR file, and by scale its LR files where they are given."""

    image: ImageFile
    lr: dict[int, ImageFile] = field(default_factory=dict)

    @property
    def files(self) -> tuple[ImageFile, ...]:
        """All files that its pixels come from."""
        return (self.image, *self.lr.values())


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
class Bad:
    """An image that could not be used, the name (relative to its source) of the file that is to blame, and why."""

    image: str
    source: str
    reason: str


@dataclass(frozen=True)
class ShardRecord:
    """A shard that was built (None: no image was left for it), its images in order, and what was wrong with others.

    `stamps` is how its source files looked before they were read.
    """

    shard: Shard | None
    images: list[ImageRecord]
    bad: list[Bad]
    stamps: list[Stamp]

    def covers(self, plan: ShardPlan) -> bool:
        """Whether it tells of all images of a plan."""
        return len(self.images) + len(self.bad) == len(plan.sources)


def stamps(source: Source) -> list[Stamp]:
    """Return how the files of an image look now.

    Raises:
        StorageError: that cannot be told, since the storage fails: they may still be as they were.
    """

    def stamp(file: ImageFile) -> Stamp:
        try:
            found = file.path.stat()
        except OSError as error:
            meaning = explain(error, file.path, file.folder)
            if isinstance(meaning, StorageError):
                raise meaning from None
            return None
        return found.st_size, found.st_mtime_ns

    return [stamp(file) for file in source.files]


def build_shard(plan: ShardPlan, proceed: Callable[[bool], bool]) -> ShardRecord:
    """Write one shard to its temporary file, an image at a time; then read it back from there and check it.

    `proceed` is told of each image whether it was good, and answers whether to go on; without it, no shard is kept:
    the record then tells what was bad by then. After an error, too, no file is left.

    Raises:
        OSError: the shard cannot be written, or does not hold what was written.
        StorageError: the storage of its sources fails.
        MemoryError: memory is short.
    """
    record = ShardRecord(None, [], [], [])
    plan.part.unlink(missing_ok=True)
    try:
        whole = _write(plan, proceed, record)
        if whole and record.images:
            return replace(record, shard=_checked(plan, record.images))
    except BaseException:
        plan.part.unlink(missing_ok=True)
        raise
    plan.part.unlink()
    return replace(record, images=[])


def _write(plan: ShardPlan, proceed: Callable[[bool], bool], record: ShardRecord) -> bool:
    """Add to a record what becomes of each image of a shard, up to the last; False if there was a stop before."""
    tiles = plan.recipe.tiles
    smallest = min(tiles.values()) ** 2 * fmt.CHANNELS
    with open_writer(plan.recipe.container, plan.part, plan.recipe.scales, smallest) as writer:
        for source in plan.sources:
            record.stamps.extend(stamps(source))
            try:
                planes = read_planes(source, plan.recipe)
            except ImageError as error:
                record.bad.append(_bad(source, error))
                if not proceed(False):
                    return False
                continue
            runs = {}
            for scale, (pixels, name, digest) in planes.items():
                height, width = pixels.shape[:2]
                run = split(pixels, tiles[scale])
                offset = writer.write(scale, source.image.stem, height, width, run)
                runs[scale] = Run(offset, zlib.crc32(run.data), name, digest)
            height, width = planes[HR][0].shape[:2]
            record.images.append(ImageRecord(source.image.stem, height, width, runs))
            if not proceed(True):
                return False
    return True


def _checked(plan: ShardPlan, images: list[ImageRecord]) -> Shard:
    """Read a shard back: every run must have the checksum of what was written."""
    runs = sorted(
        (run.offset, fmt.run_length(image.height // scale, image.width // scale, tile), run.crc32, image.name)
        for image in images
        for scale, tile in plan.recipe.tiles.items()
        for run in [image.runs[scale]]
    )
    whole = hashlib.sha256()
    with os.fdopen(open_own(plan.part), "rb") as file:
        for offset, length, expected, name in runs:
            for block in _blocks(file, offset - file.tell()):
                whole.update(block)
            crc32 = 0
            for block in _blocks(file, length):
                whole.update(block)
                crc32 = zlib.crc32(block, crc32)
            if crc32 != expected:
                raise OSError(errno.EIO, f"image {name!r} reads back otherwise than it was written", str(plan.part))
        for block in _blocks(file, os.fstat(file.fileno()).st_size - file.tell()):
            whole.update(block)
        return Shard(plan.file, file.tell(), whole.hexdigest())


def _blocks(file: BinaryIO, length: int) -> Iterator[bytes]:
    """The next bytes of a file, or fewer where it ends."""
    while length > 0 and (block := file.read(min(length, BLOCK))):
        length -= len(block)
        yield block


def _bad(source: Source, error: ImageError) -> Bad:
    """What remains of an error about a file: no path of this machine."""
    text = str(error)
    for file in source.files:
        if text.startswith(where := one_line(f"{shown(file.path)}: ")):
            return Bad(source.image.stem, file.name, text.removeprefix(where))
    return Bad(source.image.stem, source.image.name, text)


Planes = dict[int, tuple[Pixels, str | None, str | None]]


def read_planes(source: Source, recipe: Recipe) -> Planes:
    """The pixels of each plane of an image, with name and digest of the file they came from, by scale.

    Raises:
        ImageError: a file of it cannot be used; its text begins with the file's path.
        StorageError: the storage of a file fails.
    """
    hr, digest = _read(source.image, recipe.max_pixels)
    height, width = hr.shape[:2]
    planes: Planes = {HR: (hr, source.image.name, digest)}
    for scale in recipe.scales:
        whole = (height // scale, width // scale)
        if 0 in whole:
            expected = f"at least {scale} × {scale} pixels"
            raise ImageError(f"{shown(source.image.path)}: expected {expected}, got {height} × {width}")
        if scale not in source.lr:
            part = hr[: whole[0] * scale, : whole[1] * scale]
            lr = imresize(part, scale, rounding=ROUNDINGS[recipe.resize], border=recipe.border)
            planes[scale] = (lr, None, None)
            continue
        file = source.lr[scale]
        lr, digest = _read(file, recipe.max_pixels)
        if not lr_fits((height, width), lr.shape[:2], scale):
            got = f"{lr.shape[0]} × {lr.shape[1]}"
            expected = f"{whole[0]} × {whole[1]} for HR of {height} × {width}"
            raise ImageError(f"{shown(file.path)}: expected {expected}, got {got}")
        planes[scale] = (lr[: whole[0], : whole[1]], file.name, digest)
    return planes


def _read(file: ImageFile, max_pixels: int) -> tuple[Pixels, str]:
    data = read_file(file.path, max_pixels, file.folder)
    return decode(data, shown(file.path), max_pixels), hashlib.sha256(data).hexdigest()


def _rising(values: tuple[int, ...], allowed: tuple[int, ...]) -> bool:
    return values == tuple(sorted(set(values) & set(allowed)))


def _need(name: str, expected: str, got: object, holds: bool) -> None:
    if not holds:
        raise ShardsError(f"{name}: expected {expected}, got {got}")
