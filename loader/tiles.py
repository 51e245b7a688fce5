"""Pixels as square tiles: cutting an image into them, and gathering a crop out of them.

The tiles of an image are an array (rows, cols, T, T, 3), row-major; edge tiles are padded with zeros. A crop that
is much smaller than its image then touches few pages of storage, whatever the width of the image.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


def split(image: Pixels, tile: int) -> Pixels:
    """Cut an image (H, W, 3) into zero-padded tiles (ceil(H/T), ceil(W/T), T, T, 3), contiguous."""
    height, width, channels = image.shape
    rows, cols = -(-height // tile), -(-width // tile)
    padded = np.zeros((rows * tile, cols * tile, channels), np.uint8)
    padded[:height, :width] = image
    return np.ascontiguousarray(padded.reshape(rows, tile, cols, tile, channels).swapaxes(1, 2))


def gather(tiles: Pixels, top: int, left: int, out: Pixels) -> None:
    """Copy the crop at (top, left) of tiles (rows, cols, T, T, 3) into `out` (h, w, 3), pixel for pixel.

    The crop must lie within the tiles; `out` is C-contiguous.
    """
    tile = tiles.shape[2]
    height, width, channels = out.shape
    lines = list(_spans(top, height, tile))
    columns = list(_spans(left, width, tile))
    for row, rows, y, from_y, h in lines:
        for col, cols, x, from_x, w in columns:
            target = out[y : y + rows * h, x : x + cols * w].reshape(rows, h, cols, w, channels)
            source = tiles[row : row + rows, col : col + cols, from_y : from_y + h, from_x : from_x + w]
            np.copyto(target, source.swapaxes(1, 2))


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
