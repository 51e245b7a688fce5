"""Decoding of image files to 8-bit RGB."""

import io
import os
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from loader.system.safefile import open_named
from prep.images.faults import ImageError, SourceFolder, reading, shown
from prep.images.header import read_header
from prep.images.jpeg import MAX_SCANS, count_scans

Pixels = NDArray[np.uint8]

MAX_PIXELS = 1 << 28  # default limit per image: a quarter of a gigapixel
READ_WHOLE = 16 << 20  # bytes: smaller files are read at once, larger ones only if their header is acceptable
DECODING_BYTES = 8  # per pixel: the least memory that decoding takes


def read_size(path: Path, max_pixels: int = MAX_PIXELS, folder: SourceFolder | None = None) -> tuple[int, int]:
    """Return height and width of an image as `read_image` decodes it, from the file's header alone.

    Args:
        path: the image file.
        max_pixels: larger images are refused.
        folder: the folder in which the file was found, if known.

    Raises:
        ImageError: as for `decode`, or the file is missing, unreadable or not a regular file.
        StorageError: the storage fails.
    """
    with reading(path, folder), os.fdopen(open_named(path), "rb") as file:
        header = read_header(file, os.fstat(file.fileno()).st_size, shown(path), max_pixels)
    return (header.width, header.height) if header.orientation >= 5 else (header.height, header.width)


def read_file(path: Path, max_pixels: int = MAX_PIXELS, folder: SourceFolder | None = None) -> bytes:
    """Return the bytes of an image file. Large files are read only if their header is acceptable.

    Raises:
        ImageError: as for `read_size`, or the file grew while it was read.
        StorageError: as for `read_size`.
    """
    with reading(path, folder), os.fdopen(open_named(path), "rb") as file:
        length = os.fstat(file.fileno()).st_size
        if length > READ_WHOLE:
            read_header(file, length, shown(path), max_pixels)
            file.seek(0)
        data = file.read(length + 1)
    if len(data) > length:
        raise ImageError(f"{shown(path)}: expected a file of {length} bytes, got one that is growing")
    return data


def read_image(path: Path) -> Pixels:
    """Decode an image file to uint8 RGB (H, W, 3); see `read_file` and `decode`."""
    return decode(read_file(path), shown(path))


def decode(data: bytes, where: str, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode the bytes of a PNG, JPEG, BMP, TIFF or WebP file to uint8 RGB (H, W, 3).

    Grey and palette images become RGB, EXIF orientation is applied, and a fully opaque alpha channel is dropped.
    Colour profiles are ignored, as is usual in super-resolution.

    Raises:
        ImageError: 8-bit RGB cannot represent the image (more than 8 bits per channel, transparent, CMYK, animated,
            several pages), the format is not supported, the file is damaged, the image has more than `max_pixels`
            pixels, or the file has far more bytes or scans than its pixels need.
        MemoryError: there is not enough memory to decode it.
    """
    header = read_header(io.BytesIO(data), len(data), where, max_pixels, whole=True)
    if data[:2] == b"\xff\xd8":
        _check_scans(data, where)
    try:
        return np.ascontiguousarray(_upright(_rgb(data, header.height, header.width, where), header.orientation))
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError from None
        raise ImageError(f"{where}: expected an image that OpenCV can read, got: {error.err}") from None


def _check_scans(data: bytes, where: str) -> None:
    try:
        scans = count_scans(data)
    except ValueError as error:
        raise ImageError(f"{where}: expected a complete image, got a damaged one ({error})") from None
    if scans > MAX_SCANS:
        raise ImageError(f"{where}: expected at most {MAX_SCANS} scans, got {scans}")


def _rgb(data: bytes, height: int, width: int, where: str) -> Pixels:
    # Pillow reads all headers reliably; OpenCV keeps the bit depth and refuses most truncated files.
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.shape[:2] != (height, width):
        np.empty(height * width * DECODING_BYTES, np.uint8)  # MemoryError if that was the reason
        raise ImageError(f"{where}: expected a complete image of {height} × {width}, got a truncated or damaged file")
    if pixels.dtype != np.uint8:
        bits = pixels.dtype.itemsize * 8
        raise ImageError(f"{where}: expected 8 bits per channel, got {bits}; convert it first")
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        if (pixels[..., -1] != 255).any():
            raise ImageError(f"{where}: expected opaque pixels, got transparent ones; flatten it first")
        pixels = pixels[..., :-1]
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        rgb = np.repeat(pixels.reshape(height, width, 1), 3, axis=2)
    else:
        rgb = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return rgb.astype(np.uint8, copy=False)


def _upright(image: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation (TIFF 6.0, tag 274: which side stored row 0 and column 0 are on)."""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image
