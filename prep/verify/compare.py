"""Comparing the stored pixels of an image with its source files."""

from pathlib import Path

import numpy as np

from loader.errors import FormatError, ShardsError
from loader.format.layout import HR, Index, plane_name
from loader.pixels.files import Files
from loader.pixels.tiles import Pixels, split
from prep.images.faults import ImageError
from prep.shard.checksums import Finding
from prep.shard.planes import read_planes
from prep.verify.sources import SourceImages, recipe_of, unreadable


def compare_image(folder: Path, index: Index, image: int, sources: SourceImages, skip: set[int]) -> list[Finding]:
    """Compare the stored pixels of an image with its source files; LR made by the build is made again.

    Planes in `skip` (by scale) are known to be damaged. A changed source is reported as such, not by its pixels.
    """
    number = int(index.shard[image])
    path = folder / index.shards[number].file
    where = f"{path}: image {index.name[image]!r}: source"
    try:
        source = sources.find(index, image)
        planes = read_planes(source, recipe_of(index))
    except ImageError as error:
        return [Finding(number, f"{where}: {error}", image)]
    except ShardsError as error:  # the storage fails
        return [Finding(number, f"{where}: not compared: {error}", image, compared=False)]
    except OSError as error:
        failure = unreadable(error.filename or "a file", error)
        return [Finding(number, f"{where}: not compared: {failure}", image, compared=False)]
    findings = []
    for scale in index.planes:
        given = index.lr.made == "given" and scale != HR
        if scale in skip or (given and scale not in source.lr):
            continue
        file = source.lr[scale] if given else source.image
        try:
            text = _difference(folder, index, image, scale, planes[scale].pixels)
        except FormatError as error:
            findings.append(Finding(number, str(error), image, scale))
            continue
        if text:
            plane = f"{path}: {plane_name(scale)} of image {index.name[image]!r}"
            findings.append(Finding(number, f"{plane}: expected the pixels of {file.path}, got {text}", image, scale))
    return findings


def _difference(folder: Path, index: Index, image: int, scale: int, pixels: Pixels) -> str | None:
    height, width = (int(sizes[image]) for sizes in index.sizes(scale))
    if pixels.shape[:2] != (height, width):
        return f"{height} × {width} pixels, not {pixels.shape[0]} × {pixels.shape[1]}"
    plane = index.planes[scale]
    wanted = split(pixels, plane.tile)
    stored = np.empty_like(wanted)
    with Files(folder, index) as files:
        files.read(int(index.shard[image]), int(plane.offset[image]), stored.reshape(-1))
    if np.array_equal(stored, wanted):
        return None
    different = (stored != wanted).any(-1).swapaxes(1, 2).reshape(wanted.shape[0] * plane.tile, -1)
    y, x = np.argwhere(different)[0]
    return f"{np.count_nonzero(different)} different pixels, the first at row {y}, column {x}"
