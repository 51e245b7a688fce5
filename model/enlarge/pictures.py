"""Reading and writing pictures with their alpha channel and colour profile."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageOps

from loader.errors import ShardsError
from prep.images.decode import decode, read_file, read_size
from prep.images.faults import ImageError
from prep.images.header import open_image

Pixels = NDArray[np.uint8]

# Kinds of file that can be written, by suffix: Pillow's name and options.
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    ".png": ("PNG", {"compress_level": 4}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".tif": ("TIFF", {"compression": "tiff_lzw"}),
    ".tiff": ("TIFF", {"compression": "tiff_lzw"}),
    ".bmp": ("BMP", {}),
    ".webp": ("WEBP", {"lossless": True}),
}
OPAQUE_ONLY = ("JPEG", "BMP")


@dataclass(frozen=True)
class Picture:
    """RGB pixels, uint8 (H, W, 3); alpha, uint8 (H, W), or None if opaque; and the ICC colour profile."""

    rgb: Pixels
    alpha: Pixels | None = None
    profile: bytes | None = None


def read_picture(path: Path) -> Picture:
    """Read an image as `prep.images.decode.read_image` does, but keep transparency.

    Raises ImageError for images that `read_image` refuses for other reasons.
    """
    height, width = read_size(path)  # refuses unsupported kinds of file
    data = read_file(path)
    try:
        header = open_image(data, str(path))
        alpha = _transparent(data, header)
        profile = header.info.get("icc_profile") or b""
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{path}: expected a complete image, got a truncated or damaged one ({error})") from None
    # Pixels become RGB, so a grey profile no longer applies.
    kept = profile if profile[16:20] == b"RGB " else None
    if alpha is None:
        return Picture(decode(data, str(path)), None, kept)
    if alpha.shape[:2] != (height, width):
        raise ImageError(
            f"{path}: expected a complete image of {height} × {width}, got {alpha.shape[0]} × {alpha.shape[1]}"
        )
    return Picture(np.ascontiguousarray(alpha[..., :3]), np.ascontiguousarray(alpha[..., 3]), kept)


def check_kind(picture: Picture, path: Path) -> None:
    """Check that the file type named by the suffix of `path` can be written, and can hold transparency if needed.

    Raises ShardsError otherwise.
    """
    if path.suffix.lower() not in KINDS:
        raise ShardsError(f"{path}: expected a name that ends in one of {', '.join(KINDS)}, got {path.suffix!r}")
    kind, _ = KINDS[path.suffix.lower()]
    if picture.alpha is not None and kind in OPAQUE_ONLY:
        raise ShardsError(f"{path}: expected an opaque picture for {kind}, got a transparent one; write a PNG")


def encode_picture(picture: Picture, path: Path) -> bytes:
    """Return the picture encoded as the file type named by the suffix of `path`.

    Raises ShardsError as `check_kind` does, and for a picture too large for the file type.
    """
    check_kind(picture, path)
    kind, settings = KINDS[path.suffix.lower()]
    pixels = picture.rgb if picture.alpha is None else np.dstack([picture.rgb, picture.alpha])
    extras = {} if picture.profile is None or kind == "BMP" else {"icc_profile": picture.profile}
    buffer = io.BytesIO()
    try:
        Pillow.fromarray(pixels).save(buffer, kind, **settings, **extras)
    except (OSError, ValueError) as error:  # JPEG allows 65,535 pixels a side, WebP 16,383
        height, width = pixels.shape[:2]
        raise ShardsError(f"{path}: expected a size that {kind} can hold, got {height} × {width} ({error})") from None
    return buffer.getvalue()


def _transparent(data: bytes, header: Pillow.Image) -> Pixels | None:
    """Return upright RGBA, uint8 (H, W, 4); None if the picture is opaque, damaged or not 8 bits per channel."""
    if not header.has_transparency_data:
        return None
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != np.uint8:
        return None  # `decode` raises the error
    rgba: Pixels = np.asarray(ImageOps.exif_transpose(header).convert("RGBA"))
    return None if (rgba[..., 3] == 255).all() else rgba
