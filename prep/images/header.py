"""Image headers, read without the pixels and within bounds: files may be hostile.

The first bytes give the file format and, in most formats, the size in pixels. Only then is more of the file read, and
never more than an image of that size can take.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from PIL import Image, ImageFile, TiffImagePlugin

from prep.images.faults import ImageError
from prep.images.png import metadata_after_pixels
from prep.images.tiff import read_directory

ORIENTATION = 0x0112  # the EXIF tag
BITS = 258  # the TIFF tag
# The most bytes that a file may have per pixel (16 bits with alpha take 8 uncompressed; some programs add layers), and
# in addition (profiles, previews, a short film).
BYTES_PER_PIXEL = 16
EXTRA_BYTES = 64 << 20
LARGE_TILE = 1 << 24  # pixels that a TIFF tile may have whatever the limit

_KINDS = (
    (b"\x89PNG\r\n\x1a\n", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"BM", "BMP"),
    (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"), (b"MM\0+", "TIFF"),
)  # fmt: skip
# Other formats found under such names, to be named in errors.
_OTHERS = (
    (b"GIF8", "GIF"), (b"8BPS", "PSD"), (b"\xff\x0a", "JPEG XL"), (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"), (b"\xffO\xffQ", "JPEG 2000"), (b"%PDF", "PDF"), (b"v/1\x01", "OpenEXR"),
    (b"PK\x03\x04", "ZIP"),
)  # fmt: skip
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF"}


@dataclass(frozen=True)
class Header:
    """Height and width as decoded, and the EXIF orientation (1 to 8) that remains to be undone."""

    height: int
    width: int
    orientation: int


def read_header(file: IO[bytes], length: int, where: str, max_pixels: int, *, whole: bool = False) -> Header:
    """Read the header of an image file.

    Args:
        file: at any position, which changes.
        length: of the file in bytes.
        where: the file's path, for messages.
        max_pixels: larger images are refused.
        whole: check the checksums of a PNG file, too.

    Raises:
        ImageError: the format is not supported, the file is damaged or too large, or 8-bit RGB cannot represent it.
        OSError: the file cannot be read.
    """
    file.seek(0)
    head = file.read(32)
    kind = _supported_format(head, where)
    bounded = _Bounded(file, EXTRA_BYTES + (length if kind in ("PNG", "TIFF", "WEBP") else 0))
    try:
        declared = _declared(kind, head)
        _check_extent(declared, length, where, max_pixels)
        if kind == "TIFF":
            declared = _check_directory(file, length, where, max_pixels)
        metadata_follows = kind == "PNG" and metadata_after_pixels(file, whole)
        file.seek(0)
        with _factory(kind)(io.BufferedReader(bounded), "") as image:
            width, height = image.size
            if kind == "TIFF" and declared:  # some Pillow versions ignore its orientation
                height, width = declared
            _check_extent((height, width), length, where, max_pixels)
            _check_kind(image, where)
            header = Header(height, width, _orientation(image, metadata_follows))
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # on damaged files Pillow raises errors of every type
        if bounded.error or (isinstance(error, OSError) and error.errno):
            raise bounded.error or error from None
        raise ImageError(f"{where}: expected a complete image, got a damaged one ({error})") from None
    if bounded.error:  # Pillow takes some for the end of file
        raise bounded.error
    return header


def open_image(data: bytes, where: str) -> ImageFile.ImageFile:
    """Open an image file with Pillow, ignoring Pillow's size limit: check the size with `read_header` first.

    Raises:
        ImageError: the format is not supported. Damaged files raise Pillow's own errors.
    """
    return _factory(_supported_format(data[:32], where))(io.BytesIO(data), "")


def format_of(head: bytes) -> str | None:
    """Return the format of a file from its first 32 bytes, by Pillow's name; None if unknown."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12])
    return next((kind for magic, kind in (*_KINDS, *_OTHERS) if head.startswith(magic)), None)


def _supported_format(head: bytes, where: str) -> str:
    kind = format_of(head)
    if kind not in ("PNG", "JPEG", "BMP", "TIFF", "WEBP"):
        got = kind or "something else, or a damaged header"
        raise ImageError(f"{where}: expected PNG, JPEG, BMP, TIFF or WebP, got {got}")
    return kind


def _declared(kind: str, head: bytes) -> tuple[int, int] | None:
    """Return height and width from the first bytes of a PNG or WebP file, which Pillow may read whole, else None."""
    if kind == "PNG" and head[12:16] == b"IHDR":
        return int.from_bytes(head[20:24]), int.from_bytes(head[16:20])
    if kind == "WEBP" and head[12:16] == b"VP8X":
        return 1 + int.from_bytes(head[27:30], "little"), 1 + int.from_bytes(head[24:27], "little")
    if kind == "WEBP" and head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    if kind == "WEBP" and head[12:16] == b"VP8 ":
        return int.from_bytes(head[28:30], "little") & 0x3FFF, int.from_bytes(head[26:28], "little") & 0x3FFF
    if kind in ("PNG", "WEBP"):
        raise ValueError("its header has no size")
    return None


def _check_directory(file: IO[bytes], length: int, where: str, max_pixels: int) -> tuple[int, int]:
    found = read_directory(file)
    if found.more_pages:
        raise ImageError(f"{where}: expected one image, got 2 or more (an animation or several pages)")
    _check_extent((found.height, found.width), length, where, max_pixels)
    if found.tile_pixels > max(max_pixels, LARGE_TILE):
        raise ImageError(f"{where}: expected tiles of at most {max_pixels} pixels, got one of {found.tile_pixels}")
    return found.height, found.width


def _check_extent(size: tuple[int, int] | None, length: int, where: str, max_pixels: int) -> None:
    if size is None:
        return
    height, width = size
    if height * width > max_pixels:
        raise ImageError(f"{where}: expected at most {max_pixels} pixels, got {height} × {width}")
    if length > (most := EXTRA_BYTES + BYTES_PER_PIXEL * height * width):
        raise ImageError(f"{where}: expected at most {most} bytes for {height} × {width} pixels, got {length}")


def _check_kind(image: Image.Image, where: str) -> None:
    if image.mode == "CMYK":
        raise ImageError(f"{where}: expected RGB or grey, got CMYK, whose colours need a profile; convert it first")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(BITS, 1)
        deepest = max(bits) if isinstance(bits, tuple) else bits
        if deepest > 8:  # up to 64: refuse before decoding that much
            raise ImageError(f"{where}: expected 8 bits per channel, got {deepest}; convert it first")
        return
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's JPEG with previews
        raise ImageError(f"{where}: expected one image, got {frames} (an animation or several pages)")


def _orientation(image: Image.Image, metadata_follows: bool) -> int:
    if image.format == "TIFF":
        return 1  # libtiff's readers apply it themselves
    # PngImageFile.getexif decodes all pixels first, in case EXIF follows them.
    exif = Image.Image.getexif(image) if image.format == "PNG" and not metadata_follows else image.getexif()
    orientation = exif.get(ORIENTATION)
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _factory(kind: str) -> Callable[[IO[bytes], str], ImageFile.ImageFile]:
    """Return Pillow's class for a format: Image.open would try others, and has a size limit of its own."""
    if kind not in Image.OPEN:
        Image.init()
    return Image.OPEN[kind][0]


class _Bounded(io.RawIOBase):
    """A file with a limit on the total bytes read; it keeps the system error that it met."""

    def __init__(self, file: IO[bytes], budget: int) -> None:
        self.error: OSError | None = None
        self._file, self._budget = file, budget

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        if self._budget < 0:
            raise ValueError("its header is spread over the whole file")
        try:
            data = self._file.read(len(buffer))
        except OSError as error:
            self.error = self.error or error
            raise
        self._budget -= len(data)
        buffer[: len(data)] = data
        return len(data)
