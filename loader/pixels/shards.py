"""A dataset opened for reading: every image as tiles within mapped files, which each process maps when first needed."""

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
from loader.pixels.files import Files, open_shard
from loader.pixels.tiles import Ints, Pixels, gather_crops, kernel
from loader.system.filesystem import StorageWatch
from loader.system.memory_map import advise, map_file


class Shards:
    """The pixels of a dataset, read through memory maps; no library of the container is called.

    It pickles as its path and digest, and opens itself again where it is unpickled.

    Args:
        folder: holds index.json and the shards it names.

    Raises:
        FormatError: what is in the folder does not keep to the format.
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

    def need_scale(self, scale: int) -> None:
        """Raise ShardsError unless the dataset has LR of that scale."""
        if scale not in self.index.scales:
            have = ", ".join(map(str, self.index.scales)) or "none: HR alone"
            raise ShardsError(f"{self.folder}: scale: expected one that was built ({have}), got {scale}")

    def identity(self, scale: int) -> str:
        """What the dataset is, for a stream of that scale; see `dataset_identity`."""
        if scale not in self._identities:
            self._identities[scale] = dataset_identity(self.index, scale)
        return self._identities[scale]

    def tiles(self, image: int, scale: int) -> Pixels:
        """One image of the plane of that scale (1: HR), as a view (rows, cols, T, T, 3) of the mapped file."""
        shard, plane = int(self.index.shard[image]), self.index.planes[scale]
        side, (height, width) = plane.tile, self.index.sizes(scale)
        rows, cols = (tiles_across(int(pixels[image]), side) for pixels in (height, width))
        shape = (rows, cols, side, side, CHANNELS)
        return np.ndarray(shape, np.uint8, self._map(shard), int(plane.offset[image]))

    def read(self, image: int, scale: int) -> Pixels:
        """One whole image of the plane of that scale (1: HR), uint8 (h, w, 3), by one read rather than the map.

        Raises:
            FormatError: the file cannot be read, or has another length than recorded.
        """
        plane, shard = self.index.planes[scale], int(self.index.shard[image])
        height, width = (int(sizes[image]) for sizes in self.index.sizes(scale))
        cols = tiles_across(width, plane.tile)
        memory = np.empty(run_length(height, width, plane.tile), np.uint8)
        with Files(self.folder, self.index) as files:
            files.read(shard, int(plane.offset[image]), memory)
        whole = memory.reshape(-1, cols, plane.tile, plane.tile, CHANNELS).swapaxes(1, 2)
        whole = whole.reshape(-1, cols * plane.tile, CHANNELS)  # a copy, row by row
        return np.ascontiguousarray(whole[:height, :width])

    def gather(
        self, scale: int, image: Ints, top: Ints, left: Ints, out: Pixels, transform: Ints | None = None
    ) -> None:
        """Copy crops of the plane of that scale (1: HR) into `out` (n, h, w, 3), C-contiguous.

        Args:
            scale: 1, or a scale of the dataset.
            image, top, left: int64 (n,), image numbers and corners in the plane's own pixels.
            out: uint8; its shape gives the crops' number and size.
            transform: int64 (n,), one of the 8 for each crop, all square; None: the identity.

        Raises:
            IndexError: a crop reaches beyond its image.
        """
        self.check_crops(scale, image, top, left, out.shape[1:3])
        plane = self.index.planes[scale]
        cols = self.index.columns_of_tiles(scale, image)
        address = self.address(self.index.shard[image]) + plane.offset[image]
        gather_crops(address, cols, top, left, transform, plane.tile, out)

    def check_crops(self, scale: int, image: Ints, top: Ints, left: Ints, size: tuple[int, ...]) -> None:
        """Raise IndexError if a crop of that size (h, w) reaches beyond its image, or there is no such image."""
        if len(image) and not (image.min() >= 0 and image.max() < len(self.index.name)):
            raise IndexError(f"images: expected 0 to {len(self.index.name) - 1}, got {image.min()} to {image.max()}")
        height, width = self.index.height[image] // scale, self.index.width[image] // scale
        # Corners may be any int64: nothing is added to them, since sums could wrap.
        inside = (top >= 0) & (left >= 0) & (top <= height - size[0]) & (left <= width - size[1])
        if not inside.all():
            k = int(np.argmin(inside))
            raise IndexError(
                f"{plane_name(scale)} of image {self.index.name[int(image[k])]!r} is {height[k]} × {width[k]}: "
                f"no crop of {size[0]} × {size[1]} at {top[k]}, {left[k]}"
            )

    def address(self, shard: Ints) -> Ints:
        """Where shards (int64 numbers) start in memory; those not mapped yet are."""
        address = self._address[shard]
        if not address.all():
            for number in set(shard.tolist()):
                self._map(number)
            address = self._address[shard]
        return address

    def advise(self, shard: Ints, start: Ints, stop: Ints, advice: int) -> None:
        """Give the kernel advice (mmap.MADV_*) about byte ranges of shards; `start` and `stop` lie on pages."""
        address = self.address(shard) + start
        if kernel is not None:
            kernel.advise(address, stop - start, advice)
            return
        for at, length in zip(address.tolist(), (stop - start).tolist(), strict=True):
            advise(at, length, advice)

    def _map(self, number: int) -> Pixels:
        """A shard's bytes. Threads may map it twice at once: the first map is kept, the other never used."""
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
    # Crops are scattered: the kernel's own readahead would fetch megabytes around each page.
    advise(mapped.ctypes.data, shard.bytes, mmap.MADV_RANDOM)
    return mapped
