"""A dataset opened for reading: images as tiles in memory-mapped files."""

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader.errors import FormatError, ShardsError
from loader.format.identity import dataset_identity
from loader.format.index import read_index
from loader.format.layout import CHANNELS, Index, plane_name, run_length, tiles_across
from loader.pixels.byte_ranges import Ranges
from loader.pixels.crops import PlaneCrops
from loader.pixels.files import Files, open_shard
from loader.pixels.tiles import Ints, Pixels, gather_crops, gather_kernel
from loader.system.filesystem import StorageWatch
from loader.system.memory_map import advise, map_file


class Shards:
    """The pixels of a dataset, memory-mapped; each process maps a shard on first use. Never calls libhdf5.

    Pickles as path and digest, and reopens the dataset when unpickled.

    Args:
        folder: contains index.json and the shards it names.

    Raises:
        FormatError: the folder does not contain a valid dataset.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).absolute()
        self.index = read_index(self.folder)
        self.watch = StorageWatch()
        self._identities: dict[int, str] = {}  # by scale
        self._maps: dict[int, Pixels] = {}
        self._address = np.zeros(len(self.index.shards), np.int64)  # 0: not mapped yet

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "sha256": self.index.sha256}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]
        if self.index.sha256 != state["sha256"]:
            raise FormatError(f"{self.folder}: expected the dataset opened before, got one built since")

    def check_scale(self, scale: int) -> None:
        """Raise ShardsError unless the dataset has LR at `scale`."""
        if scale not in self.index.scales:
            have = ", ".join(map(str, self.index.scales)) or "none: HR alone"
            raise ShardsError(f"{self.folder}: scale: expected one that was built ({have}), got {scale}")

    def identity(self, scale: int) -> str:
        """Return the dataset's identity for a stream at `scale`, see `dataset_identity`."""
        if scale not in self._identities:
            self._identities[scale] = dataset_identity(self.index, scale)
        return self._identities[scale]

    def tiles(self, image: int, level: int) -> Pixels:
        """Return one image of a plane as a view (rows, cols, T, T, 3) of the mapped file."""
        shard, plane = int(self.index.shard[image]), self.index.planes[level]
        side, (height, width) = plane.tile, self.index.sizes(level)
        rows, cols = (tiles_across(int(pixels[image]), side) for pixels in (height, width))
        shape = (rows, cols, side, side, CHANNELS)
        return np.ndarray(shape, np.uint8, self._map(shard), int(plane.offset[image]))

    def read(self, image: int, level: int) -> Pixels:
        """Return one image of a plane, uint8 (h, w, 3), read from the file rather than its map.

        Raises:
            FormatError: the file cannot be read, or its length differs from the index.
        """
        plane, shard = self.index.planes[level], int(self.index.shard[image])
        height, width = (int(sizes[image]) for sizes in self.index.sizes(level))
        cols = tiles_across(width, plane.tile)
        memory = np.empty(run_length(height, width, plane.tile), np.uint8)
        with Files(self.folder, self.index) as files:
            files.read(shard, int(plane.offset[image]), memory)
        whole = memory.reshape(-1, cols, plane.tile, plane.tile, CHANNELS).swapaxes(1, 2)
        whole = whole.reshape(-1, cols * plane.tile, CHANNELS)  # a copy, row by row
        return np.ascontiguousarray(whole[:height, :width])

    def gather(self, crops: PlaneCrops, out: Pixels) -> None:
        """Copy crops into `out`, uint8 (n, side, side, 3), C-contiguous.

        Raises:
            IndexError: a crop reaches beyond its image, or there is no such image.
        """
        self.check_crops(crops)
        plane = self.index.planes[crops.level]
        cols = self.index.columns_of_tiles(crops.level, crops.image)
        address = self.addresses(self.index.shard[crops.image]) + plane.offset[crops.image]
        gather_crops(address, cols, crops.top, crops.left, crops.transform, plane.tile, out)

    def check_crops(self, crops: PlaneCrops) -> None:
        """Raise IndexError if a crop reaches beyond its image, or there is no such image."""
        level, side, image, top, left = crops.level, crops.side, crops.image, crops.top, crops.left
        if len(image) and not (image.min() >= 0 and image.max() < len(self.index.name)):
            raise IndexError(f"images: expected 0 to {len(self.index.name) - 1}, got {image.min()} to {image.max()}")
        height, width = self.index.height[image] // level, self.index.width[image] // level
        # Corners may be any int64: a sum of one and a side could wrap around.
        inside = (top >= 0) & (left >= 0) & (top <= height - side) & (left <= width - side)
        if not inside.all():
            k = int(np.argmin(inside))
            raise IndexError(
                f"{plane_name(level)} of image {self.index.name[int(image[k])]!r} is {height[k]} × {width[k]}: "
                f"no crop of {side} × {side} at {top[k]}, {left[k]}"
            )

    def addresses(self, shard: Ints) -> Ints:
        """Return where shards, by number, start in memory; map them if necessary."""
        address = self._address[shard]
        if not address.all():
            for number in set(shard.tolist()):
                self._map(number)
            address = self._address[shard]
        return address

    def advise(self, ranges: Ranges, advice: int) -> None:
        """Give the system advice (mmap.MADV_*) on ranges that start and stop on pages."""
        address, length = self.addresses(ranges.shard) + ranges.start, ranges.stop - ranges.start
        if gather_kernel is not None:
            gather_kernel.advise(address, length, advice)
            return
        for at, count in zip(address.tolist(), length.tolist(), strict=True):
            advise(at, count, advice)

    def _map(self, number: int) -> Pixels:
        """Return the mapped bytes of a shard. If two threads map it at once, the first map is kept."""
        if number not in self._maps:
            mapped = _map_file(self.folder, self.index, number)
            self._maps.setdefault(number, mapped)
            self._address[number] = self._maps[number].ctypes.data
        return self._maps[number]


def _map_file(folder: Path, index: Index, number: int) -> NDArray[np.uint8]:
    shard = index.shards[number]
    descriptor = open_shard(folder, index, number)
    try:
        mapped = map_file(descriptor, shard.bytes)
    except OSError as error:
        raise FormatError(f"{folder / shard.file}: expected a file that can be mapped, got {error.strerror}") from None
    finally:
        os.close(descriptor)
    # Crops are scattered: the system's own read-ahead would fetch megabytes around each page.
    advise(mapped.ctypes.data, shard.bytes, mmap.MADV_RANDOM)
    return mapped
