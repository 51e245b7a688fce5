"""A dataset opened for reading: every image as tiles within mapped files, which each process maps when first needed."""

import mmap
import os
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from loader.format import CHANNELS, FormatError, Shard, ShardsError, plane_name
from loader.index import read_index
from loader.kernel import compiled
from loader.tiles import Pixels, gather

kernel = compiled("loader._gather")

Ints = NDArray[np.int64]


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
            have = ", ".join(map(str, self.index.scales)) or "none"
            raise ShardsError(f"{self.folder}: scale: expected one that was built ({have}), got {scale}")

    def tiles(self, image: int, scale: int) -> Pixels:
        """One image of the plane of that scale (1: HR), as a view (rows, cols, T, T, 3) of the mapped file."""
        shard, plane = int(self.index.shard[image]), self.index.planes[scale]
        side, (height, width) = plane.tile, self.index.sizes(scale)
        shape = (-(-int(height[image]) // side), -(-int(width[image]) // side), side, side, CHANNELS)
        return np.ndarray(shape, np.uint8, self._map(shard), int(plane.offset[image]))

    def gather(self, scale: int, image: Ints, top: Ints, left: Ints, out: Pixels) -> None:
        """Copy crops of the plane of that scale (1: HR) into `out` (n, h, w, 3), C-contiguous.

        Args:
            scale: 1, or a scale of the dataset.
            image, top, left: int64 (n,), image numbers and corners in the plane's own pixels.
            out: uint8; its shape gives the crops' number and size.

        Raises:
            IndexError: a crop reaches beyond its image.
        """
        plane = self.index.planes[scale]
        height, width = self.index.height[image] // scale, self.index.width[image] // scale
        inside = (top >= 0) & (left >= 0) & (top + out.shape[1] <= height) & (left + out.shape[2] <= width)
        if not inside.all():
            self._outside(scale, image, top, left, out, int(np.argmin(inside)))
        if kernel is None:
            for k, number in enumerate(image.tolist()):
                gather(self.tiles(number, scale), int(top[k]), int(left[k]), out[k])
            return
        shard = self.index.shard[image]
        if not (address := self._address[shard]).all():
            for number in set(shard.tolist()):
                self._map(number)
            address = self._address[shard]
        cols = -(-width // plane.tile)
        kernel.gather(address + plane.offset[image], cols, top, left, plane.tile, *out.shape[1:3], out)

    def _outside(self, scale: int, image: Ints, top: Ints, left: Ints, out: Pixels, k: int) -> NoReturn:
        height, width = (sizes[image[k]] for sizes in self.index.sizes(scale))
        raise IndexError(
            f"{plane_name(scale)} of image {self.index.name[int(image[k])]!r} is {height} × {width}: "
            f"no crop of {out.shape[1]} × {out.shape[2]} at {top[k]}, {left[k]}"
        )

    def _map(self, number: int) -> Pixels:
        """A shard's bytes. Threads may map it twice at once: the first map is kept, the other never used."""
        if number not in self._maps:
            mapped = _map_file(self.folder, self.index.shards[number])
            self._maps.setdefault(number, mapped)
            self._address[number] = self._maps[number].ctypes.data
        return self._maps[number]


def _map_file(folder: Path, shard: Shard) -> Pixels:
    path = folder / shard.file
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != shard.bytes:
                raise FormatError(f"{path}: length: expected {shard.bytes} bytes, got {size}")
            mapped = mmap.mmap(file.fileno(), shard.bytes, access=mmap.ACCESS_READ)
    except OSError as error:
        raise FormatError(f"{path}: expected a file that can be mapped, got {error.strerror}") from None
    # Crops are scattered: the kernel's readahead would fetch megabytes around each page.
    mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, np.uint8)
