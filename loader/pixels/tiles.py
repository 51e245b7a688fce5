"""Pixels as square tiles: cutting an image into them, and gathering crops out of them.

The tiles of an image are an array (rows, cols, T, T, 3), row-major; edge tiles are padded with zeros. A crop that is
much smaller than its image then touches few pages of storage, whatever the width of the image.
"""

import ctypes
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from loader.format.layout import CHANNELS, tiles_across
from loader.native import compiled

Pixels = NDArray[np.uint8]
Ints = NDArray[np.int64]

kernel = compiled("loader.pixels._gather")


def split(image: Pixels, tile: int) -> Pixels:
    """Cut an image (H, W, 3) into zero-padded tiles (ceil(H/T), ceil(W/T), T, T, 3), contiguous."""
    height, width, channels = image.shape
    rows, cols = tiles_across(height, tile), tiles_across(width, tile)
    padded = np.zeros((rows * tile, cols * tile, channels), np.uint8)
    padded[:height, :width] = image
    return np.ascontiguousarray(padded.reshape(rows, tile, cols, tile, channels).swapaxes(1, 2))


def gather_crops(
    address: Ints, cols: Ints, top: Ints, left: Ints, transform: Ints | None, tile: int, out: Pixels
) -> None:
    """Copy one crop out of each of several images' tiles, and transform it, without holding the interpreter's lock.

    Args:
        address: int64 (n,), where the tiles of each image start in memory. The caller answers for them, and for the
            memory that a crop touches; no other is read.
        cols: int64 (n,), tiles in a row of tiles.
        top, left: int64 (n,), the crop's corner in pixels.
        transform: int64 (n,), 0 to 7, as in `transformed`; crops are then square. None: all as they are.
        tile: side of a tile.
        out: uint8 (n, h, w, 3), C-contiguous.

    Raises:
        TypeError, ValueError: an array is of another kind or length; a crop begins before its image, or reaches beyond
            its rows of tiles or the address space; a transform is none of the 8. How far down an image goes cannot be
            known here.
    """
    height, width = out.shape[1:3]
    if transform is None:
        transform = np.zeros_like(address)
    if kernel is not None:
        kernel.gather(address, cols, top, left, transform, tile, height, width, out)
        return
    columns = {"address": address, "cols": cols, "top": top, "left": left, "transform": transform}
    crops = _checked_crops(columns, tile, out)
    for k, (start, c, y, x, number) in enumerate(crops):
        shape = ((y + height - 1) // tile + 1, c, tile, tile, CHANNELS)
        memory = (ctypes.c_uint8 * math.prod(shape)).from_address(start)
        tiles: Pixels = np.ndarray(shape, np.uint8, memory)  # type: ignore[arg-type]
        if number:
            plain = np.empty((height, width, CHANNELS), np.uint8)
            gather(tiles, y, x, plain)
            out[k] = transformed(plain, number)
        else:
            gather(tiles, y, x, out[k])


def _checked_crops(columns: dict[str, Ints], tile: int, out: Pixels) -> list[tuple[int, ...]]:
    """What the kernel checks: the crops as tuples of integers, none of which can lead beyond what its caller has."""
    for name, column in columns.items():
        if column.dtype != np.int64:
            raise TypeError(f"{name}: expected a C-contiguous array of int64, got items of {column.dtype}")
        if column.shape != (len(out),) or not column.flags.c_contiguous:
            raise ValueError(f"{name}: the arrays' lengths do not fit one another: expected ({len(out)},) contiguous")
    if out.dtype != np.uint8:
        raise TypeError(f"out: expected a C-contiguous array of uint8, got items of {out.dtype}")
    _, height, width, channels = out.shape
    if channels != CHANNELS or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError("out: expected (n, height, width, 3), contiguous and writable")
    if not all(1 <= side < 1 << 30 for side in (tile, height, width)):
        raise ValueError("gather: tile, height, width: expected 1 to 2**30 - 1")
    crops = list(zip(*(column.tolist() for column in columns.values()), strict=True))
    for start, cols, top, left, number in crops:
        reach = start + (top + height + tile - 1) // tile * cols * tile * tile * CHANNELS
        fits = top >= 0 and 0 <= left <= cols * tile - width and 0 < start <= reach < 1 << 63
        if not fits or not 0 <= number < 8 or (number & 4 and height != width):
            raise ValueError(
                f"gather: expected a crop within its rows of tiles and the address space, under one of 8 transforms, "
                f"got {height} × {width} at {top}, {left} of {cols} columns of tiles, transform {number}"
            )
    return crops


def gather(tiles: Pixels, top: int, left: int, out: Pixels) -> None:
    """Copy the crop at (top, left) of tiles (rows, cols, T, T, 3) into `out` (h, w, 3), C-contiguous."""
    tile = tiles.shape[2]
    height, width, channels = out.shape
    lines = list(_spans(top, height, tile))
    columns = list(_spans(left, width, tile))
    for row, rows, y, from_y, h in lines:
        for col, cols, x, from_x, w in columns:
            target = out[y : y + rows * h, x : x + cols * w].reshape(rows, h, cols, w, channels)
            source = tiles[row : row + rows, col : col + cols, from_y : from_y + h, from_x : from_x + w]
            np.copyto(target, source.swapaxes(1, 2))


def transformed(image: Pixels, number: int) -> Pixels:
    """A view of (h, w, 3) under transform 0..7: bit 0 mirrors columns, bit 1 mirrors rows, bit 2 then transposes."""
    if number & 1:
        image = image[:, ::-1]
    if number & 2:
        image = image[::-1]
    return image.swapaxes(0, 1) if number & 4 else image


def _spans(start: int, length: int, tile: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Split [start, start + length) at tiles: yields (first tile, tiles, position, first pixel, pixels per tile)."""
    end, at = start + length, start
    if at % tile:
        stop = min(end, at - at % tile + tile)
        yield at // tile, 1, 0, at % tile, stop - at
        at = stop
    if whole := (end - at) // tile:
        yield at // tile, whole, at - start, 0, tile
        at += whole * tile
    if at < end:
        yield at // tile, 1, at - start, 0, end - at
