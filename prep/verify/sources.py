"""The files that a dataset was made from: found again, known to be the same, and compared with what is stored."""

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loader.errors import FormatError, ShardsError
from loader.format.layout import HR, RESIZES, Index, plane_name
from loader.pixels.files import Files
from loader.pixels.tiles import Pixels, split
from loader.system.safefile import open_named
from prep.images.faults import NOWHERE, ImageError, StorageError
from prep.images.find import ImageFile
from prep.plan.dataset import Source
from prep.plan.recipe import Recipe
from prep.shard.checksums import Finding
from prep.shard.planes import read_planes


@dataclass(frozen=True)
class Originals:
    """Where the images are (folders, or files named outright), and the folder of LR images, where LR was given."""

    folders: tuple[Path, ...]
    lr: Path | None = None

    def source(self, index: Index, image: int) -> Source:
        """The files of one image of a dataset; LR only where it was given and is there to compare.

        Raises:
            StorageError: whether a file has changed cannot be told: it cannot be read.
            ImageError: a file is missing, or has changed since the build.
        """
        lr = {}
        if index.lr.made == "given" and self.lr is not None:
            for scale in index.scales:
                inner = self.lr / f"X{scale}"
                lr[scale] = _find(index, image, scale, (inner if _mode(inner, stat.S_ISDIR) else self.lr,))
        return Source(_find(index, image, HR, self.folders), lr)

    def has_all(self, index: Index) -> bool:
        """Whether every plane can be compared."""
        return index.lr.made != "given" or self.lr is not None


def recipe_of(index: Index) -> Recipe:
    """How a dataset was built, as far as its bytes depend on it."""
    made = index.lr
    return Recipe(
        scales=index.scales,
        container=index.container,
        tile=index.planes[HR].tile,
        images_per_shard=index.images_per_shard,
        resize=made.resize or RESIZES[0],
        border="replicate" if made.border == "replicate" else "symmetric",
        given_lr=made.made == "given",
        max_pixels=int((index.height * index.width).max()),
    )


def compare_image(folder: Path, index: Index, image: int, originals: Originals, skip: set[int]) -> list[Finding]:
    """Hold the stored pixels of an image against its source files, LR made from it again.

    Planes in `skip` (by scale) are known to be damaged. A source that has changed is told as such, not by its pixels.
    """
    number = int(index.shard[image])
    path = folder / index.shards[number].file
    where = f"{path}: image {index.name[image]!r}: source"
    try:
        source = originals.source(index, image)
        planes = read_planes(source, recipe_of(index))
    except ImageError as error:
        return [Finding(number, f"{where}: {error}", image)]
    except ShardsError as error:  # of the storage
        return [Finding(number, f"{where}: not compared: {error}", image, compared=False)]
    except OSError as error:
        failure = _unreadable(error.filename or "a file", error)
        return [Finding(number, f"{where}: not compared: {failure}", image, compared=False)]
    findings = []
    for scale in index.planes:
        given = index.lr.made == "given" and scale != HR
        if scale in skip or (given and scale not in source.lr):
            continue
        file = source.lr[scale] if given else source.image
        try:
            text = _difference(folder, index, image, scale, planes[scale].pixels)
        except FormatError as error:
            findings.append(Finding(number, str(error), image, scale))
            continue
        if text:
            place = f"{path}: {plane_name(scale)} of image {index.name[image]!r}"
            findings.append(Finding(number, f"{place}: expected the pixels of {file.path}, got {text}", image, scale))
    return findings


def _difference(folder: Path, index: Index, image: int, scale: int, pixels: Pixels) -> str | None:
    height, width = (int(sizes[image]) for sizes in index.sizes(scale))
    if pixels.shape[:2] != (height, width):
        return f"{height} × {width} of them in place of {pixels.shape[0]} × {pixels.shape[1]}"
    plane = index.planes[scale]
    wanted = split(pixels, plane.tile)
    stored = np.empty_like(wanted)
    with Files(folder, index) as files:
        files.read(int(index.shard[image]), int(plane.offset[image]), stored.reshape(-1))
    if np.array_equal(stored, wanted):
        return None
    other = (stored != wanted).any(-1).swapaxes(1, 2).reshape(wanted.shape[0] * plane.tile, -1)
    y, x = np.argwhere(other)[0]
    return f"{np.count_nonzero(other)} others, the first at row {y}, column {x}"


def _unreadable(path: Path | str, error: OSError) -> StorageError:
    """What the storage does not give may have changed, or not."""
    return StorageError(f"{path}: could not be read: {error.strerror or error}")


def _find(index: Index, image: int, scale: int, folders: tuple[Path, ...]) -> ImageFile:
    """The file that a plane of an image came from: the one of its name and digest."""
    plane = index.planes[scale]
    assert plane.source is not None
    assert plane.source_sha256 is not None
    name, expected = plane.source[image], plane.source_sha256[image]
    places = [folder / name if _mode(folder, stat.S_ISDIR) else folder for folder in folders]
    there = [path for path in places if path.as_posix().endswith(name) and _mode(path, stat.S_ISREG)]
    if not there:
        raise ImageError(f"{name}: expected this file in {', '.join(map(str, folders))}, got none there")
    others: list[str] = []
    failures: list[StorageError] = []
    for path in there:
        try:
            digest = _sha256(path)
        except OSError as error:
            failures.append(_unreadable(path, error))
            continue
        if digest == expected:
            return ImageFile(path, name)
        others.append(f"{path}: changed since the build: sha256: expected {expected}, got {digest}")
    if failures:  # it may be the one
        raise failures[0]
    raise ImageError(others[0])


def _mode(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether there is something of a kind. StorageError where the storage does not tell."""
    try:
        return kind(path.stat().st_mode)
    except OSError as error:
        if error.errno in NOWHERE:
            return False
        raise _unreadable(path, error) from None


def _sha256(path: Path) -> str:
    with os.fdopen(open_named(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
