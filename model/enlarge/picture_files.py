"""The input and output files of `model.upscale`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loader.errors import ShardsError
from model.enlarge.pictures import KINDS
from prep.images.find import SUFFIXES

OTHER_KINDS = (".gif", ".jp2", ".jxl", ".avif", ".heic", ".ppm", ".tga", ".exr", ".pdf")  # recognised, but not written


@dataclass(frozen=True)
class Job:
    """A picture to enlarge and the file to write."""

    source: Path
    target: Path


def names_a_file(out: Path) -> bool:
    """Return whether `--out` is a file rather than a folder: it exists as one, or its suffix is that of an image."""
    if out.is_dir():
        return False
    return out.exists() or out.suffix.lower() in {*KINDS, *OTHER_KINDS}


def find_pictures(source: Path, scale: int) -> Iterator[Path]:
    """Yield an image file itself, or the images directly in a folder, except results of an earlier run.

    Raises ShardsError if `source` is missing, not an image, or a folder without images.
    """
    if not source.is_dir():
        if not source.is_file():
            raise ShardsError(f"{source}: expected an image file or a folder of images, got no such file")
        if source.suffix.lower() not in SUFFIXES:
            raise ShardsError(f"{source}: expected an image ({', '.join(SUFFIXES)}), got {source.suffix!r}")
        return iter([source])
    try:
        entries = sorted(source.iterdir())
    except OSError as error:
        raise ShardsError(f"{source}: expected a readable folder, got {error.strerror}") from None
    paths = [p for p in entries if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()]
    results = {f"{path.stem}_x{scale}.png" for path in paths}
    if not paths:
        raise ShardsError(f"{source}: expected a folder with images ({', '.join(SUFFIXES)}), got none")
    return (path for path in paths if path.name not in results)


def check_target(job: Job, inputs: set[Path], written: set[Path], overwrite: bool) -> None:
    """Check that the target is not an input, a result of this run, or (without `overwrite`) an existing file."""
    resolved = job.target.resolve()
    if resolved in inputs:
        raise ShardsError(f"{job.source}: {job.target} is an input file; choose another --out")
    if resolved in written:
        raise ShardsError(f"{job.source}: {job.target} was already written for another image; rename one of them")
    if job.target.is_dir():
        raise ShardsError(f"{job.source}: {job.target}: expected a regular file or a new path, got a folder")
    if job.target.exists() and not overwrite:
        raise ShardsError(f"{job.source}: {job.target} exists; use --overwrite to replace it")
