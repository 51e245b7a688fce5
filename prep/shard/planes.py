"""The pixels of an image in every plane: decoded from its files, or made from HR."""

import hashlib
from dataclasses import dataclass

from loader.format.layout import HR
from loader.pixels.tiles import Pixels
from loader.resize.imresize import Rounding, imresize
from prep.images.decode import decode, read_file
from prep.images.faults import ImageError, shown
from prep.images.find import ImageFile
from prep.images.pair import lr_fits
from prep.plan.dataset import Source
from prep.plan.recipe import Recipe

ROUNDINGS: dict[str, Rounding] = {"matlab-uint8": "uint8", "matlab-double": "double"}


@dataclass(frozen=True)
class PlanePixels:
    """The pixels (H, W, 3) of an image in one plane, with name and SHA-256 of their file (None if made from HR)."""

    pixels: Pixels
    source: str | None = None
    source_sha256: str | None = None


def read_planes(source: Source, recipe: Recipe) -> dict[int, PlanePixels]:
    """Return the pixels of an image by level.

    Raises:
        ImageError: a file cannot be used; the message starts with its path.
        StorageError: the storage of a file fails.
    """
    hr = _read(source.image, recipe.max_pixels)
    height, width = hr.pixels.shape[:2]
    planes = {HR: hr}
    for scale in recipe.scales:
        rows, cols = height // scale, width // scale
        if not rows or not cols:
            expected = f"at least {scale} × {scale} pixels"
            raise ImageError(f"{shown(source.image.path)}: expected {expected}, got {height} × {width}")
        if scale not in source.lr:
            whole = hr.pixels[: rows * scale, : cols * scale]
            planes[scale] = PlanePixels(imresize(whole, scale, rounding=ROUNDINGS[recipe.resize], border=recipe.border))
            continue
        file = source.lr[scale]
        lr = _read(file, recipe.max_pixels)
        if not lr_fits((height, width), lr.pixels.shape[:2], scale):
            got = f"{lr.pixels.shape[0]} × {lr.pixels.shape[1]}"
            expected = f"{rows} × {cols} for HR of {height} × {width}"
            raise ImageError(f"{shown(file.path)}: expected {expected}, got {got}")
        planes[scale] = PlanePixels(lr.pixels[:rows, :cols], lr.source, lr.source_sha256)
    return planes


def _read(file: ImageFile, max_pixels: int) -> PlanePixels:
    data = read_file(file.path, max_pixels, file.folder)
    return PlanePixels(decode(data, shown(file.path), max_pixels), file.name, hashlib.sha256(data).hexdigest())
