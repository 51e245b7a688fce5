"""Enlarge pictures: `python -m model.upscale IMAGE... --checkpoint FILE`.

Alpha channels are kept (enlarged by MATLAB's bicubic), as are RGB colour profiles; EXIF orientation is applied.
Large pictures are enlarged tile by tile, which bounds the memory used beyond the pictures themselves.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import click

from loader.errors import ShardsError, one_line
from loader.system.safefile import write_atomically
from model.device import is_out_of_memory, pick_device
from model.enlarge.allocator import keep_freed_memory
from model.enlarge.alpha import enlarge_alpha
from model.enlarge.networks import describe, open_network
from model.enlarge.options import (
    Weights,
    choose_tiling,
    device_option,
    ensemble_option,
    overlap_option,
    weights_option,
)
from model.enlarge.picture_files import Job, check_target, find_pictures, names_a_file
from model.enlarge.pictures import KINDS, Picture, check_kind, encode_picture, read_picture
from model.enlarge.tiles import Tile, Tiling
from model.enlarge.upscalers import NonFiniteError, Upscaler, network_upscaler
from prep.console.errors import errors_as_messages
from prep.console.paths import GivenPath
from prep.console.progress import Progress
from prep.console.unix import UnixCommand, tell
from prep.images.decoders import configure_decoders


def parse_tile(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    """Return a number of pixels, None for "auto"; raise BadParameter for anything else."""
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"expected auto or a number of LR pixels, got {value!r}")
    return int(value)


@click.command(cls=UnixCommand)
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=GivenPath())
@click.option("--checkpoint", type=GivenPath(), required=True, help="Checkpoint of the network.")
@click.option(
    "--out",
    type=GivenPath(),
    help="Folder for NAME_x4.png, or a file for a single image.  [default: next to each image]",
)
@click.option("--scale", type=int, help="Fail unless the network has this scale.")
@click.option("--tile", callback=parse_tile, default="auto", show_default=True, help="Tile size in LR pixels, or auto.")
@overlap_option
@ensemble_option
@weights_option
@device_option
@click.option("--overwrite", is_flag=True, help="Replace existing results. Inputs are never replaced.")
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
    """Enlarge pictures with a trained network.

    IMAGE: image files, or folders of images (not recursive). A picture that cannot be enlarged is reported and
    skipped; the exit code is then 1.
    """
    if overlap is not None and tile is None:
        raise click.UsageError("--overlap needs --tile with a number of pixels")
    single = out is not None and names_a_file(out)
    if out is not None and single:
        if out.suffix.lower() not in KINDS:
            raise click.UsageError(
                one_line(f"--out {out}: expected a folder, or a name that ends in one of {', '.join(KINDS)}")
            )
        if len(images) > 1 or images[0].is_dir():
            raise click.UsageError(one_line(f"--out {out}: expected a folder for several images, got a file"))
    configure_decoders()
    keep_freed_memory()
    with errors_as_messages():
        loaded, network = open_network(checkpoint, weights, scale)
    place = pick_device(device)
    tiling: Tiling | Literal["auto"] = "auto" if tile is None else choose_tiling(network, tile, overlap)
    click.echo(f"{describe(loaded, network)}, on {place}")
    factor = loaded.config.scale
    upscale = network_upscaler(
        network.to(place), place, tiling=tiling, self_ensemble=self_ensemble, progress=report_progress
    )
    failed = False
    sources: list[Path] = []
    for image in images:
        try:
            sources += find_pictures(image, factor)
        except ShardsError as error:
            failed = True
            tell(one_line(f"Error: {error}"))
    inputs = {source.resolve() for source in [*sources, checkpoint]}
    written: set[Path] = set()
    for source in sources:
        target = out if out is not None and single else (out or source.parent) / f"{source.stem}_x{factor}.png"
        try:
            check_target(Job(source, target), inputs, written, overwrite)
            line = enlarge_file(Job(source, target), upscale, factor)
            written.add(target.resolve())  # only now: a failed picture must not block another of its name
            click.echo(line)
        except ShardsError as error:
            failed = True
            tell(one_line(f"Error: {error}"))
    if failed:
        sys.exit(1)


def report_progress(tiles: Sequence[Tile]) -> Iterator[Tile]:
    """Yield the tiles and report how many are done."""
    with Progress(len(tiles), "tile", keep=False) as progress:
        for done, tile in enumerate(tiles, 1):
            yield tile
            progress(done)


def enlarge_file(job: Job, upscale: Upscaler, scale: int) -> str:
    """Enlarge one picture and return a line about it; ShardsError, with nothing written, if that fails."""
    started = time.perf_counter()
    picture = read_picture(job.source)
    check_kind(picture, job.target)  # before the slow part
    try:
        rgb = upscale(picture.rgb)
        alpha = None if picture.alpha is None else enlarge_alpha(picture.alpha, scale)
        data = encode_picture(Picture(rgb, alpha, picture.profile), job.target)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ShardsError(f"{job.source}: out of memory; try --tile 128 or less") from error
    except NonFiniteError as error:
        raise ShardsError(f"{job.source}: {error}") from error
    try:
        job.target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(job.target, data)
    except OSError as error:
        raise ShardsError(f"{job.source}: {job.target}: expected a writable path, got {error.strerror}") from error
    (height, width), (tall, wide) = picture.rgb.shape[:2], rgb.shape[:2]
    seconds = time.perf_counter() - started
    return one_line(f"{job.source} -> {job.target}  {width} x {height} -> {wide} x {tall}, {seconds:.1f} s")
