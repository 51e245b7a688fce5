"""The on-disk format: the parts of a dataset, and the names and sizes that follow from them.

FORMAT.md describes the format in prose; loader.format.index reads and writes it as index.json. Writers and readers of
shards share only this package. Index columns are numpy arrays, so a million images cost no Python objects.

A plane is identified by its level: 1 (`HR`) for high resolution, otherwise its scale.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

FORMAT = "srshards"
VERSION = 1
INDEX = "index.json"
SCALES = (2, 3, 4, 8)
CONTAINERS = {"hdf5": ".h5", "raw": ".raw"}
RESIZES = ("matlab-uint8", "matlab-double")
BORDERS = ("symmetric", "replicate")
LR_KINDS = ("imresize", "given", "none")
HR = 1  # the level of the HR plane
SAMPLES = "uint8"
CHANNELS = 3
PAGE = 4096  # every run of tiles starts on a page
MAX_NAME = 1024  # characters of an image's name; no file system has such long ones
MAX_SIDE = 1 << 20  # pixels; keeps every product below 2**63
TILES = (16, 1024)  # smallest and largest tile; tiles are multiples of 16


Count = TypeVar("Count", int, NDArray[np.int64])


class Strings(Sequence[str]):
    """An immutable column of strings, held as one array of UTF-8 bytes and one of ends."""

    def __init__(self, items: Sequence[str]) -> None:
        encoded = [item.encode() for item in items]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"{i} is not in a column of {len(self)}")
        i %= len(self)
        return self._bytes[self._ends[i] : self._ends[i + 1]].tobytes().decode()

    def encoded(self) -> tuple[bytes, NDArray[np.int64]]:
        """The UTF-8 bytes of all strings, one after another, and the length of each."""
        return self._bytes.tobytes(), np.diff(self._ends)


@dataclass(frozen=True)
class Shard:
    """One file of many images: its name within the dataset's folder, length in bytes, SHA-256 in hex."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class LrOrigin:
    """The origin of LR: `made` is one of LR_KINDS; "imresize" has its rounding and border, "none" is HR alone."""

    made: str
    resize: str | None = None
    border: str | None = None


@dataclass(frozen=True, eq=False)
class Plane:
    """One plane, one entry per image.

    offset: int64, byte at which the tile run starts in the image's shard; crc32: int64, of that run;
    source, source_sha256: name and SHA-256 (hex) of the file the pixels came from, None if LR was made from HR.
    """

    tile: int
    offset: NDArray[np.int64]
    crc32: NDArray[np.int64]
    source: Strings | None = None
    source_sha256: Strings | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Index:
    """A dataset: its shards, its images (columns name, shard, height, width: HR pixels), and its planes by level.

    `made_by` and `libraries` (versions by name, of what decoded and wrote) are information: nothing depends on them.
    """

    container: str
    made_by: str
    libraries: Mapping[str, str]
    lr: LrOrigin
    images_per_shard: int
    shards: tuple[Shard, ...]
    name: Strings
    shard: NDArray[np.int64]
    height: NDArray[np.int64]
    width: NDArray[np.int64]
    planes: dict[int, Plane]
    sha256: str = ""  # of index.json itself, once it has been written

    @property
    def scales(self) -> tuple[int, ...]:
        """The scales for which there is LR."""
        return tuple(level for level in self.planes if level != HR)

    def sizes(self, level: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return heights and widths (images,) in pixels of a plane."""
        return self.height // level, self.width // level

    def columns_of_tiles(self, level: int, image: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tiles in a row of tiles (n,) of a plane, for images by number (n,)."""
        return tiles_across(self.width[image] // level, self.planes[level].tile)

    def run_lengths(self, level: int) -> NDArray[np.int64]:
        """Return the bytes (images,) of each tile run in a plane."""
        return run_length(*self.sizes(level), self.planes[level].tile)


def tiles_across(pixels: Count, tile: int) -> Count:
    """Return how many tiles cover so many pixels along one side."""
    return -(-pixels // tile)


def run_length(height: Count, width: Count, tile: int) -> Count:
    """Return the bytes of the tile run of a plane of height × width pixels."""
    return tiles_across(height, tile) * tiles_across(width, tile) * (tile * tile * CHANNELS)


def plane_name(level: int) -> str:
    """Return the key of a plane in the index: HR, X2, X4, …"""
    return "HR" if level == HR else f"X{level}"


def plane_group(level: int) -> str:
    """Return the HDF5 group that holds the images of a plane."""
    return "HR" if level == HR else f"LR_bicubic/X{level}"


def plane_tile(tile: int, level: int) -> int:
    """Return the tile size of a plane, given that of HR: half for LR, whose patches are smaller, but at least 32."""
    return tile if level == HR else min(tile, max(32, tile // 2))


def shard_file(number: int, container: str) -> str:
    """Return the file name of shard `number`."""
    return f"shard-{number:05d}{CONTAINERS[container]}"


def shard_number(file: str) -> int | None:
    """Return the number in a shard's file name, or None if it is no such name."""
    found = re.fullmatch(r"shard-([0-9]{5}|[1-9][0-9]{5,14})\.(h5|raw)", file)
    return int(found[1]) if found else None


def is_source_name(name: str) -> bool:
    """Whether a string can name a source: a path within a folder, that does not lead out of it."""
    return name != "" and name[0] != "/" and "\0" not in name and (".." not in name or ".." not in name.split("/"))


def is_image_name(name: str) -> bool:
    """Whether a string can name an image: it is a file's stem, and a link in an HDF5 group."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name and len(name) <= MAX_NAME
