"""Make pictures larger: `python -m model.upscale IMAGE... --checkpoint FILE`.

Transparency is kept, enlarged by MATLAB's bicubic, and so are RGB colour profiles; EXIF orientation is applied.
Memory is bounded by the pictures themselves, since large ones are enlarged tile by tile.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
import numpy as np

from loader.errors import ShardsError, one_line
from loader.resize.imresize import enlarge
from loader.system.safefile import write_atomically
from model.device import pick_device
from model.enlarge.options import (
    Weights,
    choose_tiling,
    describe,
    device_option,
    ensemble_option,
    open_network,
    overlap_option,
    weights_option,
)
from model.enlarge.pictures import KINDS, Picture, Pixels, check_kind, encode_picture, read_picture
from model.enlarge.tiles import Span, Tiling, spans
from model.enlarge.upscalers import OutputError, Upscaler, keep_freed_memory, network_upscaler
from prep.console.paths import GivenPath
from prep.console.progress import Progress
from prep.console.unix import UnixCommand, tell
from prep.images.decoders import configure_decoders
from prep.images.find import SUFFIXES

STRIP = 1 << 18  # LR pixels of alpha enlarged at once
BICUBIC_RADIUS = 3  # LR pixels that matter to an enlarged one, at most
OTHER_KINDS = (".gif", ".jp2", ".jxl", ".avif", ".heic", ".ppm", ".tga", ".exr", ".pdf")  # not written here


@dataclass(frozen=True)
class Job:
    """A picture to enlarge, and the file to write."""

    source: Path
    target: Path


def read_tile(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    """Read a number of pixels, or "auto", which is None; a usage error for anything else."""
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"expected auto or a number of LR pixels, got {value!r}")
    return int(value)


@click.command(cls=UnixCommand)
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=GivenPath())
@click.option("--checkpoint", type=GivenPath(), required=True, help="Weights of the network.")
@click.option(
    "--out",
    type=GivenPath(),
    help="Folder for NAME_x4.png, or a file for a single image.  [default: beside each image]",
)
@click.option("--scale", type=int, help="Fail if the network's is another.")
@click.option(
    "--tile", callback=read_tile, default="auto", show_default=True, help="LR pixels of a tile's side, or auto."
)
@overlap_option
@ensemble_option
@weights_option
@device_option
@click.option("--overwrite", is_flag=True, help="Replace results that exist. Sources are never replaced.")
def main(
    images: tuple[Path, ...],
    checkpoint: Path,
    out: Path | None,
    scale: int | None,
    tile: int | None,
    overlap: int | None,
    self_ensemble: bool,
    weights: Weights,
    device: str,
    overwrite: bool,
) -> None:
    """Make pictures larger by a trained network.

    IMAGE: picture files, or folders (without the folders in them). A picture that cannot be enlarged is told of, and
    the others are done; the exit code then is 1.
    """
    if overlap is not None and tile is None:
        raise click.UsageError("--overlap needs --tile with a number of pixels")
    single = out is not None and names_file(out)
    if out is not None and single:
        if out.suffix.lower() not in KINDS:
            raise click.UsageError(
                one_line(f"--out {out}: expected a folder, or a name that ends in one of {', '.join(KINDS)}")
            )
        if len(images) > 1 or images[0].is_dir():
            raise click.UsageError(one_line(f"--out {out}: expected a folder for more than one image, got a file"))
    configure_decoders()
    keep_freed_memory()
    try:
        loaded, network = open_network(checkpoint, weights, scale)
    except ShardsError as error:
        raise click.ClickException(str(error)) from error
    place = pick_device(device)
    tiling: Tiling | Literal["auto"] = "auto" if tile is None else choose_tiling(network, tile, overlap)
    click.echo(f"{describe(loaded, network)}, on {place}")
    factor = loaded.config.scale
    upscale = network_upscaler(network.to(place), place, tiling=tiling, self_ensemble=self_ensemble, watch=progress)
    failed = 0
    taken: set[Path] = set()
    sources: list[Path] = []
    for image in images:
        try:
            sources += find_pictures(image, factor)
        except ShardsError as error:
            failed += 1
            tell(one_line(f"Error: {error}"))
    originals = {source.resolve() for source in [*sources, checkpoint]}
    for source in sources:
        target = out if out is not None and single else (out or source.parent) / f"{source.stem}_x{factor}.png"
        try:
            check_target(Job(source, target), originals, taken, overwrite)
            line = enlarge_picture(Job(source, target), upscale, factor)
            taken.add(target.resolve())  # not before: what failed stands in nobody's way
            click.echo(line)
        except ShardsError as error:
            failed += 1
            tell(one_line(f"Error: {error}"))
    if failed:
        sys.exit(1)


def names_file(out: Path) -> bool:
    """Whether `--out` is a file for one picture: there is one, or it ends as files of pictures do."""
    if out.is_dir():
        return False
    return out.exists() or out.suffix.lower() in {*KINDS, *OTHER_KINDS}


def progress(tiles: Sequence[tuple[Span, Span]]) -> Iterator[tuple[Span, Span]]:
    """Yield tiles one after another and report how many are done."""
    with Progress(len(tiles), "tile", keep=False) as report:
        for done, tile in enumerate(tiles, 1):
            yield tile
            report(done)


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


def enlarge_picture(job: Job, upscale: Upscaler, scale: int) -> str:
    """Enlarge one picture and say in a line what was done; ShardsError, with nothing written, if it cannot be."""
    started = time.perf_counter()
    picture = read_picture(job.source)
    check_kind(picture, job.target)  # before the long part
    try:
        rgb = upscale(picture.rgb)
        alpha = None if picture.alpha is None else enlarge_strips(picture.alpha, scale)
        data = encode_picture(Picture(rgb, alpha, picture.profile), job.target)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):  # torch says it in words only on the CPU
            raise
        raise ShardsError(f"{job.source}: out of memory; try --tile with a small number, 128 or less") from error
    except OutputError as error:
        raise ShardsError(f"{job.source}: {error}") from error
    try:
        job.target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(job.target, data)
    except OSError as error:
        raise ShardsError(f"{job.source}: {job.target}: expected to write there, got {error.strerror}") from error
    (height, width), (tall, wide) = picture.rgb.shape[:2], rgb.shape[:2]
    seconds = time.perf_counter() - started
    return one_line(f"{job.source} -> {job.target}  {width} x {height} -> {wide} x {tall}, {seconds:.1f} s")


def enlarge_strips(plane: Pixels, scale: int) -> Pixels:
    """Enlarge (H, W) by MATLAB's bicubic, strip by strip: it works in doubles, which take memory."""
    height, width = plane.shape
    large = np.empty((height * scale, width * scale), np.uint8)
    for rows in spans(height, Tiling(max(1, STRIP // width), BICUBIC_RADIUS)):
        strip = enlarge(plane[rows.first : rows.last], scale)[(rows.start - rows.first) * scale :]
        large[rows.start * scale : rows.stop * scale] = strip[: (rows.stop - rows.start) * scale]
    return large
