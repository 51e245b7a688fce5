"""Pictures that a person wants larger: read with their transparency and colour profile, and written with them."""

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

# What can be written, by suffix: Pillow's name and how to write it.
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
    """Pixels, uint8 RGB (H, W, 3); alpha, uint8 (H, W), unless all is opaque; and the profile its colours are in."""

    rgb: Pixels
    alpha: Pixels | None = None
    profile: bytes | None = None


def read_picture(path: Path) -> Picture:
    """Read what `prep.images.decode.read_image` reads, and transparent pictures too; ImageError for all else."""
    height, width = read_size(path)  # refuses the kinds of file that cannot be used
    data = read_file(path)
    try:
        header = open_image(data, str(path))
        alpha = _transparent(data, header)
        profile = header.info.get("icc_profile") or b""
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{path}: expected a whole image, got a cut or damaged one ({error})") from None
    # Pixels become RGB: the profile of a grey picture has nothing to say about them.
    kept = profile if profile[16:20] == b"RGB " else None
    if alpha is None:
        return Picture(decode(data, str(path)), None, kept)
    if alpha.shape[:2] != (height, width):
        raise ImageError(
            f"{path}: expected a whole image of {height} × {width}, got {alpha.shape[0]} × {alpha.shape[1]}"
        )
    return Picture(np.ascontiguousarray(alpha[..., :3]), np.ascontiguousarray(alpha[..., 3]), kept)


def check_kind(picture: Picture, path: Path) -> None:
    """Raise ShardsError for a suffix of `path` that cannot be written, or whose kind has no transparency to hold."""
    if path.suffix.lower() not in KINDS:
        raise ShardsError(f"{path}: expected a name that ends in one of {', '.join(KINDS)}, got {path.suffix!r}")
    kind, _ = KINDS[path.suffix.lower()]
    if picture.alpha is not None and kind in OPAQUE_ONLY:
        raise ShardsError(f"{path}: expected an opaque picture for {kind}, got a transparent one; write it as PNG")


def encode_picture(picture: Picture, path: Path) -> bytes:
    """Give the bytes of a file of the kind that the suffix of `path` says.

    Raises ShardsError as `check_kind` does, and for a picture too large for its kind.
    """
    check_kind(picture, path)
    kind, settings = KINDS[path.suffix.lower()]
    pixels = picture.rgb if picture.alpha is None else np.dstack([picture.rgb, picture.alpha])
    extras = {} if picture.profile is None or kind == "BMP" else {"icc_profile": picture.profile}
    buffer = io.BytesIO()
    try:
        Pillow.fromarray(pixels).save(buffer, kind, **settings, **extras)
    except (OSError, ValueError) as error:  # JPEG ends at 65,535 pixels a side, WebP at 16,383
        height, width = pixels.shape[:2]
        raise ShardsError(f"{path}: expected a size that {kind} can hold, got {height} × {width} ({error})") from None
    return buffer.getvalue()


def _transparent(data: bytes, header: Pillow.Image) -> Pixels | None:
    """The pixels as RGBA, upright, of a picture of 8 bits per channel that is not wholly opaque; None for others."""
    if not header.has_transparency_data:
        return None
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != np.uint8:
        return None  # damaged, or deeper than 8 bits: for the usual reading to refuse
    rgba: Pixels = np.asarray(ImageOps.exif_transpose(header).convert("RGBA"))
    return None if (rgba[..., 3] == 255).all() else rgba
