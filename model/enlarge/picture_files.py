"""Which pictures `model.upscale` reads, and which files it may write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loader.errors import ShardsError
from model.enlarge.pictures import KINDS
from prep.images.find import SUFFIXES

OTHER_KINDS = (".gif", ".jp2", ".jxl", ".avif", ".heic", ".ppm", ".tga", ".exr", ".pdf")  # not written here


@dataclass(frozen=True)
class Job:
    """A picture to enlarge, and the file to write."""

    source: Path
    target: Path


def names_a_file(out: Path) -> bool:
    """Whether `--out` is a file for one picture: there is one, or it ends as files of pictures do."""
    if out.is_dir():
        return False
    return out.exists() or out.suffix.lower() in {*KINDS, *OTHER_KINDS}


def find_pictures(source: Path, scale: int) -> Iterator[Path]:
    """Give an image file, or those right in a folder but for what an earlier run made of others there.

    Raises ShardsError for a source that is missing, no image, or a folder without images.
    """
    if not source.is_dir():
        if not source.is_file():
            raise ShardsError(f"{source}: expected an image file or a folder of images, got nothing there")
        if source.suffix.lower() not in SUFFIXES:
            raise ShardsError(f"{source}: expected an image ({', '.join(SUFFIXES)}), got {source.suffix!r}")
        return iter([source])
    try:
        entries = sorted(source.iterdir())
    except OSError as error:
        raise ShardsError(f"{source}: expected a folder that can be read, got {error.strerror}") from None
    paths = [p for p in entries if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()]
    results = {f"{path.stem}_x{scale}.png" for path in paths}
    if not paths:
        raise ShardsError(f"{source}: expected images ({', '.join(SUFFIXES)}), got none in this folder")
    return (path for path in paths if path.name not in results)


def check_target(job: Job, originals: set[Path], taken: set[Path], overwrite: bool) -> None:
    """Hold that a result replaces neither a source, nor another result of this run, nor, unasked, any file."""
    place = job.target.resolve()
    if place in originals:
        raise ShardsError(f"{job.source}: {job.target} is one of the files that are read; choose another --out")
    if place in taken:
        raise ShardsError(f"{job.source}: {job.target} is already the result of another image of this run; rename one")
    if job.target.is_dir():
        raise ShardsError(f"{job.source}: {job.target}: expected a file or nothing there, got a folder")
    if job.target.exists() and not overwrite:
        raise ShardsError(f"{job.source}: {job.target} exists; add --overwrite to replace it")
