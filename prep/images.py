"""Image files: pairing HR with given LR, and decoding them to 8-bit RGB or saying why not."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from loader.format import ShardsError
from loader.safefile import open_named
from prep.faults import ImageError, Place, StorageError, reading, shown
from prep.header import ORIENTATION, read_header
from prep.jpeg import MAX_SCANS, count_scans
from prep.sources import SUFFIXES, ImageFile, Note, find_images, is_folder, listing, same
from prep.threads import in_threads

__all__ = [
    "HEADER_THREADS", "MAX_PIXELS", "ORIENTATION", "SUFFIXES", "ImageError", "ImageFile", "Pixels", "StorageError",
    "check_sizes", "decode", "find_images", "lr_fits", "pair_lr", "read_file", "read_image", "read_size",
]  # fmt: skip

Pixels = NDArray[np.uint8]

MAX_PIXELS = 1 << 28  # by default: a quarter of a gigapixel
HEADER_THREADS = 16  # headers are small reads: on network storage they take the time of a round trip each
SMALL = 16 << 20  # bytes: a file of no more is read without a look at its header before
DECODING = 8  # bytes for each pixel: the least that decoding needs


def pair_lr(images: Sequence[ImageFile], folder: Path, scale: int, note: Note = lambda text: None) -> list[ImageFile]:
    """Return the LR file of each image: `folder/X4/0001x4.png`, or `folder/0001x4.png` where there is no folder X4.

    Names that differ in nothing but their Unicode normal form are the same. `note` is as for `find_images`.

    Raises:
        ShardsError: listing every image without LR and every LR without image.
    """
    suffix = f"x{scale}"
    inner = folder / f"X{scale}"
    apart = is_folder(inner)
    files = {same(file.stem): file for file in find_images([inner if apart else folder], note)}
    if not apart:  # files of several scales side by side
        files = {stem: file for stem, file in files.items() if stem.endswith(suffix)}
    wanted = {same(image.stem + suffix): image for image in images}
    problems = [f"{shown(image.path)}: no LR image {stem}" for stem, image in wanted.items() if stem not in files]
    problems += [f"{shown(file.path)}: no HR image for it" for stem, file in files.items() if stem not in wanted]
    if problems:
        raise ShardsError(listing(f"expected one LR image for each HR image at scale {scale}, got misfits", problems))
    return [files[stem] for stem in wanted]


def check_sizes(images: Sequence[ImageFile], lr: Sequence[ImageFile], scale: int) -> None:
    """Hold that each LR image is its HR image's size divided by the scale, rounded down or (as MATLAB does) up.

    Raises:
        ShardsError: listing every pair that does not fit, and every file whose header cannot be read.
        StorageError: headers cannot be read since the storage fails.
    """

    def misfit(pair: tuple[ImageFile, ImageFile]) -> str | None:
        try:
            (height, width), small = (read_size(file.path, place=file.place) for file in pair)
        except ImageError as error:
            return str(error)
        if lr_fits((height, width), small, scale):
            return None
        expected = f"{height // scale} × {width // scale}"
        return f"{shown(pair[1].path)}: expected {expected} for HR of {height} × {width}, got {small[0]} × {small[1]}"

    pairs = list(zip(images, lr, strict=True))
    if problems := list(filter(None, in_threads(misfit, pairs, HEADER_THREADS))):
        raise ShardsError(listing(f"expected LR sizes that fit scale {scale}, got misfits", problems))


def lr_fits(hr: tuple[int, int], lr: tuple[int, int], scale: int) -> bool:
    """Whether LR of a size (H, W) can belong to HR of a size."""
    return all(small in (big // scale, -(-big // scale)) for big, small in zip(hr, lr, strict=True))


def read_size(path: Path, max_pixels: int = MAX_PIXELS, place: Place | None = None) -> tuple[int, int]:
    """Return height and width of an image as `read_image` gives it, from the file's header alone.

    Raises:
        ImageError: as `decode`, or the file is missing, forbidden or no regular file.
        StorageError: the storage fails; `place` is the folder in which the file was found, if that is known.
    """
    with reading(path, place), os.fdopen(open_named(path), "rb") as file:
        header = read_header(file, os.fstat(file.fileno()).st_size, shown(path), max_pixels)
    return (header.width, header.height) if header.turn >= 5 else (header.height, header.width)


def read_file(path: Path, max_pixels: int = MAX_PIXELS, place: Place | None = None) -> bytes:
    """Return the bytes of an image file; those behind its header are read only if that is one to be decoded.

    Raises:
        ImageError: as `read_size`, or the file grows meanwhile.
        StorageError: as `read_size`.
    """
    with reading(path, place), os.fdopen(open_named(path), "rb") as file:
        length = os.fstat(file.fileno()).st_size
        if length > SMALL:
            read_header(file, length, shown(path), max_pixels)
            file.seek(0)
        data = file.read(length + 1)
    if len(data) > length:
        raise ImageError(f"{shown(path)}: expected a file of {length} bytes, got one that grows")
    return data


def read_image(path: Path) -> Pixels:
    """Decode an image file to uint8 RGB (H, W, 3); see `read_file` and `decode`."""
    return decode(read_file(path), shown(path))


def decode(data: bytes, where: str, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode the bytes of a PNG, JPEG, BMP, TIFF or WebP file to uint8 RGB (H, W, 3).

    Grey and palette images become RGB, an EXIF orientation is applied, a fully opaque alpha channel is dropped.
    Colour profiles are ignored, as everywhere in super-resolution.

    Raises:
        ImageError: the file is damaged, or more than 8 bits deep, transparent, CMYK, animated, of several pages,
            larger than `max_pixels`, or of another kind: what 8-bit RGB cannot hold faithfully; or it has far more
            bytes, or scans, than its pixels need.
        MemoryError: there is too little memory to tell.
    """
    header = read_header(io.BytesIO(data), len(data), where, max_pixels, whole=True)
    if data[:2] == b"\xff\xd8":
        _check_scans(data, where)
    try:
        return np.ascontiguousarray(_upright(_rgb(data, header.height, header.width, where), header.turn))
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError from None
        raise ImageError(
            f"{where}: expected an image that OpenCV reads, got one that it does not: {error.err}"
        ) from None


def _check_scans(data: bytes, where: str) -> None:
    try:
        scans = count_scans(data)
    except ValueError as error:
        raise ImageError(f"{where}: expected a whole image, got a damaged one ({error})") from None
    if scans > MAX_SCANS:
        raise ImageError(f"{where}: expected at most {MAX_SCANS} scans, got {scans}")


def _rgb(data: bytes, height: int, width: int, where: str) -> Pixels:
    # Pillow reads headers of all kinds reliably, OpenCV keeps the depth of pixels and refuses most cut files.
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.shape[:2] != (height, width):
        np.empty(height * width * DECODING, np.uint8)  # a MemoryError where that was the reason
        raise ImageError(f"{where}: expected a whole image of {height} × {width}, got a cut or damaged file")
    if pixels.dtype != np.uint8:
        bits = pixels.dtype.itemsize * 8
        raise ImageError(f"{where}: expected 8 bits per channel, got {bits}; convert it first, as you see fit")
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
    """Undo an EXIF orientation (TIFF 6.0, tag 274: where row 0 and column 0 of the stored image belong)."""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image
