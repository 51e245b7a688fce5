"""What the header of an image file says, read without its pixels, and within bounds: files may come from strangers.

The first bytes tell the kind of file, and mostly its size in pixels. Only then is more of it read, and never more than
such an image can be worth.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from PIL import Image, ImageFile, TiffImagePlugin

from prep.images.faults import ImageError
from prep.images.png import metadata_behind_pixels
from prep.images.tiff import read_directory

ORIENTATION = 0x0112  # the EXIF tag
BITS = 258  # the TIFF tag
# A file may have so many bytes for each pixel of its image (16 bits and alpha take 8 where nothing is compressed; the
# rest is for layers that some programs add), and so many besides (profiles, previews, a short film).
BYTES_PER_PIXEL = 16
BYTES_BESIDES = 64 << 20
LARGE_TILE = 1 << 24  # pixels: a tile of a TIFF file may always have so many

_KINDS = (
    (b"\x89PNG\r\n\x1a\n", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"BM", "BMP"),
    (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"), (b"MM\0+", "TIFF"),
)  # fmt: skip
# What else is met under such names, to be told by name.
_OTHERS = (
    (b"GIF8", "GIF"), (b"8BPS", "PSD"), (b"\xff\x0a", "JPEG XL"), (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"), (b"\xffO\xffQ", "JPEG 2000"), (b"%PDF", "PDF"), (b"v/1\x01", "OpenEXR"),
    (b"PK\x03\x04", "ZIP"),
)  # fmt: skip
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF"}


@dataclass(frozen=True)
class Header:
    """Height and width as decoded, and the EXIF orientation (1 to 8) still to be undone."""

    height: int
    width: int
    turn: int


def read_header(file: IO[bytes], length: int, where: str, max_pixels: int, *, whole: bool = False) -> Header:
    """Read the header of an image file of a kind that can be used.

    Args:
        file: at any place; it is elsewhere afterwards.
        length: of the file in bytes.
        where: the file's path, for messages.
        max_pixels: an image of more is refused.
        whole: hold the checksums in a PNG file, too.

    Raises:
        ImageError: the file is of another kind, damaged, too large, or holds what 8-bit RGB cannot.
        OSError: it cannot be read.
    """
    file.seek(0)
    head = file.read(32)
    kind = kind_of(head)
    if kind not in ("PNG", "JPEG", "BMP", "TIFF", "WEBP"):
        got = kind or "something else, or a damaged header"
        raise ImageError(f"{where}: expected PNG, JPEG, BMP, TIFF or WebP, got {got}")
    bounded = _Bounded(file, BYTES_BESIDES + (length if kind in ("PNG", "TIFF", "WEBP") else 0))
    try:
        declared = _declared(kind, head)
        _check_extent(declared, length, where, max_pixels)
        if kind == "TIFF":
            declared = _check_directory(file, length, where, max_pixels)
        behind = kind == "PNG" and metadata_behind_pixels(file, whole)
        file.seek(0)
        with _factory(kind)(io.BufferedReader(bounded), "") as image:
            width, height = image.size
            if kind == "TIFF" and declared:  # not every Pillow heeds its orientation
                height, width = declared
            _check_extent((height, width), length, where, max_pixels)
            _check_kind(image, where)
            header = Header(height, width, _orientation(image, behind))
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers meet damaged files with errors of every kind
        if bounded.error or (isinstance(error, OSError) and error.errno):
            raise bounded.error or error from None
        raise ImageError(f"{where}: expected a whole image, got a damaged one ({error})") from None
    if bounded.error:  # Pillow takes some for the end of the file
        raise bounded.error
    return header


def kind_of(head: bytes) -> str | None:
    """Return the kind of a file by its first 32 bytes, as Pillow calls it; None for what is not known."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12])
    return next((kind for magic, kind in (*_KINDS, *_OTHERS) if head.startswith(magic)), None)


def _declared(kind: str, head: bytes) -> tuple[int, int] | None:
    """Height and width by the first bytes of a PNG or WebP file, of which Pillow may read all at once."""
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
        raise ValueError("its header tells no size")
    return None


def _check_directory(file: IO[bytes], length: int, where: str, max_pixels: int) -> tuple[int, int]:
    found = read_directory(file)
    if found.more:
        raise ImageError(f"{where}: expected one picture, got 2 or more (an animation or several pages)")
    _check_extent((found.height, found.width), length, where, max_pixels)
    if found.tile > max(max_pixels, LARGE_TILE):
        raise ImageError(f"{where}: expected tiles of at most {max_pixels} pixels, got one of {found.tile}")
    return found.height, found.width


def _check_extent(size: tuple[int, int] | None, length: int, where: str, max_pixels: int) -> None:
    if size is None:
        return
    height, width = size
    if height * width > max_pixels:
        raise ImageError(f"{where}: expected at most {max_pixels} pixels, got {height} × {width}")
    if length > (most := BYTES_BESIDES + BYTES_PER_PIXEL * height * width):
        raise ImageError(f"{where}: expected at most {most} bytes for {height} × {width} pixels, got {length}")


def _check_kind(image: Image.Image, where: str) -> None:
    if image.mode == "CMYK":
        raise ImageError(f"{where}: expected RGB or grey, got CMYK, whose colours need a profile; convert it first")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(BITS, 1)
        deepest = max(bits) if isinstance(bits, tuple) else bits
        if deepest > 8:  # up to 64: known before so much is decoded
            raise ImageError(f"{where}: expected 8 bits per channel, got {deepest}; convert it first, as you see fit")
        return
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's JPEG, with previews
        raise ImageError(f"{where}: expected one picture, got {frames} (an animation or several pages)")


def _orientation(image: Image.Image, behind: bool) -> int:
    if image.format == "TIFF":
        return 1  # libtiff's readers turn it themselves
    # PngImageFile's own way decodes all pixels first: what if EXIF stands behind them?
    exif = Image.Image.getexif(image) if image.format == "PNG" and not behind else image.getexif()
    turn = exif.get(ORIENTATION)
    return turn if isinstance(turn, int) and 1 <= turn <= 8 else 1


def _factory(kind: str) -> Callable[[IO[bytes], str], ImageFile.ImageFile]:
    """Pillow's class for a kind of file: Image.open would try others, and has a limit of its own."""
    if kind not in Image.OPEN:
        Image.init()
    return Image.OPEN[kind][0]


class _Bounded(io.RawIOBase):
    """A file of which only so many bytes are read in all; it keeps the error of the system that it met."""

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
