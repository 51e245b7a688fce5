"""The on-disk format and nothing else: what a dataset consists of, and the names and sizes that follow from it.

FORMAT.md describes the format in prose, loader.format.index reads and writes it as `index.json`. Writers and readers of
shards meet only here. Columns of the index are numpy arrays, so that a million images cost no Python objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = "srshards"
VERSION = 1
INDEX = "index.json"
SCALES = (2, 3, 4, 8)
CONTAINERS = {"hdf5": ".h5", "raw": ".raw"}
RESIZES = ("matlab-uint8", "matlab-double")
BORDERS = ("symmetric", "replicate")
HR = 1  # the scale of the HR plane
CHANNELS = 3
PAGE = 4096  # every run of tiles starts on a page
MAX_NAME = 1024  # characters of an image's name; no file system has such long ones
MAX_SIDE = 1 << 20  # pixels; keeps every product below 2**63
TILES = (16, 1024)  # smallest and largest tile; tiles are multiples of 16


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
    """How LR was made: by `imresize` (rounding and border as in loader.resize.imresize), or given as images."""

    made: str
    resize: str | None = None
    border: str | None = None


@dataclass(frozen=True, eq=False)
class Plane:
    """HR (scale 1) or LR of one scale, one entry per image.

    offset: int64, byte at which the run of tiles starts in the image's shard; crc32: int64, of that run;
    source, source_sha256: name and SHA-256 (hex) of the file the pixels came from, None where LR was made from HR.
    """

    tile: int
    offset: NDArray[np.int64]
    crc32: NDArray[np.int64]
    source: Strings | None
    source_sha256: Strings | None


@dataclass(frozen=True, eq=False)
class Index:
    """A dataset: its shards, its images (columns name, shard, height, width: HR pixels), and planes by scale."""

    container: str
    made_by: str
    lr: LrOrigin
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
        return tuple(scale for scale in self.planes if scale != HR)

    def sizes(self, scale: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Heights and widths (images,) in the pixels of the plane of that scale (1: HR)."""
        return self.height // scale, self.width // scale

    def columns_of_tiles(self, scale: int, image: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tiles in each row of tiles (n,), for images by number (n,), in the plane of that scale (1: HR)."""
        return -(-(self.width[image] // scale) // self.planes[scale].tile)

    def run_lengths(self, scale: int) -> NDArray[np.int64]:
        """Bytes (images,) of each run of tiles in the plane of that scale (1: HR)."""
        tile = self.planes[scale].tile
        height, width = self.sizes(scale)
        return -(-height // tile) * -(-width // tile) * tile * tile * CHANNELS


def plane_name(scale: int) -> str:
    """The key of a plane in the index: HR, X2, X4, …"""
    return "HR" if scale == HR else f"X{scale}"


def plane_group(scale: int) -> str:
    """The HDF5 group that holds the images of a plane."""
    return "HR" if scale == HR else f"LR_bicubic/X{scale}"


def plane_tile(tile: int, scale: int) -> int:
    """The tile of a plane, given that of HR: LR patches are smaller, and so are LR tiles, down to 32 pixels."""
    return tile if scale == HR else min(tile, max(32, tile // 2))


def shard_file(number: int, container: str) -> str:
    """The file name of shard `number`."""
    return f"shard-{number:05d}{CONTAINERS[container]}"


def is_source_name(name: str) -> bool:
    """Whether a string can name a source: a path within a folder, that does not lead out of it."""
    return name != "" and name[0] != "/" and "\0" not in name and (".." not in name or ".." not in name.split("/"))


def is_image_name(name: str) -> bool:
    """Whether a string can name an image: it is a file's stem, and a link in an HDF5 group."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name and len(name) <= MAX_NAME
