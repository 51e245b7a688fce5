"""PSNR and SSIM of a network, or of bicubic enlargement, on test images: `python -m model.evaluate`.

The images are a folder of HR, with LR from another or made by MATLAB's bicubic, or a dataset of shards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, astuple
from pathlib import Path

import click

from loader import ImageDataset
from loader.errors import ShardsError, one_line
from loader.format.layout import SCALES
from loader.system.safefile import write_atomically
from model.device import pick_device
from model.enlarge.options import (
    Weights,
    check_folder,
    check_output,
    choose_tiling,
    describe,
    device_option,
    ensemble_option,
    open_network,
    overlap_option,
    weights_option,
)
from model.enlarge.pictures import Picture, encode_picture
from model.enlarge.upscalers import OutputError, Upscaler, bicubic_upscaler, keep_freed_memory, network_upscaler
from model.evaluate.pairs import LeaveOut, Pair, large_enough, read_pairs, shard_pairs
from model.evaluate.sheet import Row, make_row, write_sheet
from model.metrics import Image, Scores, mean_scores, score
from prep.console.paths import GivenPath
from prep.console.progress import Progress
from prep.console.unix import UnixCommand, tell
from prep.images.decoders import configure_decoders

Watcher = Callable[[Pair, Image], None]


def score_pairs(
    upscale: Upscaler, pairs: Iterable[Pair], border: int, *, watch: Watcher | None = None
) -> Iterator[tuple[str, Scores]]:
    """Enlarge each LR image and compare it with HR, leaving out `border` pixels along every edge.

    `watch` is called with each pair and its result. Raises ShardsError, naming the image, where it is too small or an
    upscaler's result has another size or is no image.
    """
    for pair in pairs:
        try:
            sr = upscale(pair.lr)
            scores = score(sr, pair.hr, border)
        except (ValueError, OutputError) as error:
            raise ShardsError(one_line(f"image {pair.name}: {error}")) from error
        if watch is not None:
            watch(pair, sr)
        yield pair.name, scores


@click.command(cls=UnixCommand)
@click.option("--hr", type=GivenPath(), help="Folder of HR images.")
@click.option("--lr", type=GivenPath(), help="Folder of LR images.  [default: made from HR]")
@click.option("--shards", type=GivenPath(), help="Dataset of shards, in place of --hr and --lr.")
@click.option("--scale", type=int, required=True, help="2, 3, 4 or 8.")
@click.option("--checkpoint", type=GivenPath(), help="Weights to evaluate.")
@click.option("--bicubic", is_flag=True, help="Evaluate MATLAB's bicubic enlargement instead.")
@weights_option
@ensemble_option
@click.option("--tile", type=click.IntRange(min=1), help="LR pixels of a tile's side.  [default: whole images]")
@overlap_option
@click.option("--save", type=GivenPath(), help="Folder for the results, as NAME_x4.png.")
@click.option("--sheet", type=GivenPath(), help="PNG file for crops of the first images, side by side.")
@click.option("--sheet-rows", type=click.IntRange(min=1), default=8, show_default=True, help="Images on the sheet.")
@click.option("--json", "as_json", is_flag=True, help="For programs; a PSNR of equal images is null.")
@device_option
def main(
    hr: Path | None,
    lr: Path | None,
    shards: Path | None,
    scale: int,
    checkpoint: Path | None,
    bicubic: bool,
    weights: Weights,
    self_ensemble: bool,
    tile: int | None,
    overlap: int | None,
    save: Path | None,
    sheet: Path | None,
    sheet_rows: int,
    as_json: bool,
    device: str,
) -> None:
    """PSNR and SSIM in RGB and on MATLAB's Y, per image and on average; the border left out is the scale.

    Images too small to be scored are told of and left out of the mean; the exit code is 1 only if none is left.
    """
    if bicubic == (checkpoint is not None):
        raise click.UsageError("give either --checkpoint FILE or --bicubic")
    if (hr is None) == (shards is None):
        raise click.UsageError("give either --hr DIR or --shards DIR")
    if lr is not None and shards is not None:
        raise click.UsageError("--lr goes with --hr; --shards holds LR")
    if bicubic and (self_ensemble or tile is not None or sheet is not None):
        raise click.UsageError("--self-ensemble, --tile and --sheet need --checkpoint")
    if overlap is not None and tile is None:
        raise click.UsageError("--overlap needs --tile")
    if scale not in SCALES:
        raise click.BadParameter(f"expected one of {SCALES}, got {scale}", param_hint="'--scale'")
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise click.BadParameter(
            one_line(f"expected a name that ends in .png, got {sheet.name!r}"), param_hint="'--sheet'"
        )
    configure_decoders()
    try:
        inputs = [given for given in (hr, lr, shards, checkpoint) if given is not None]
        if save is not None:
            _make_folder(save, inputs)
        if sheet is not None:  # now, not after an hour
            check_output(sheet, inputs)
        if checkpoint is not None:
            upscale, heading = _network(checkpoint, weights, scale, device, tile, overlap, self_ensemble)
        else:
            upscale, heading = bicubic_upscaler(scale), ["bicubic enlargement, MATLAB's"]
        source = f"shards {shards}" if hr is None else str(lr) if lr is not None else None
        heading.append(f"LR {'made from HR by MATLAB bicubic' if source is None else f'from {source}'}, scale {scale}")
        heading.append(f"border cropped before measuring: {scale} pixels on each side")
        say = _silent if as_json else _say
        for line in [*heading, "image PSNR-RGB SSIM-RGB PSNR-Y SSIM-Y"]:
            say(line)
        left_out: dict[str, str] = {}
        rows: list[Row] = []

        def watch(pair: Pair, sr: Image) -> None:
            if save is not None:
                path = save / f"{pair.name}_x{scale}.png"
                write_atomically(path, encode_picture(Picture(sr), path))
            if sheet is not None and len(rows) < sheet_rows:
                rows.append(make_row(pair.name, pair.lr, sr, bicubic_upscaler(scale)(pair.lr), pair.hr, scale))

        collected: dict[str, Scores] = {}
        with Progress(None, "image") as progress:

            def leave_out(name: str, lack: str) -> None:
                left_out[name] = lack
                progress.note(one_line(f"image {name} is left out: {lack}"))

            pairs = large_enough(_pairs(hr, lr, shards, scale, leave_out), scale, leave_out)
            for name, scores in score_pairs(upscale, pairs, scale, watch=watch):
                collected[name] = scores
                if not as_json:
                    progress.print(_line(name, scores))
                progress(len(collected))
        if not collected:
            raise ShardsError(f"expected images that can be scored, got {len(left_out)} too small ones")
        mean = mean_scores(collected.values())
        if left_out:
            tell(f"the mean is over {len(collected)} images; {len(left_out)} too small ones are left out")
        say(_line("mean", mean))
        if sheet is not None:
            write_sheet(rows, sheet)
        if as_json:
            images = {name: _numbers(scores) for name, scores in collected.items()}
            facts = {"notes": heading, "scale": scale, "border": scale, "images": images, "mean": _numbers(mean)}
            facts["left_out"] = left_out
            click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
    except ShardsError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(one_line(f"{error.filename}: {error.strerror}")) from error


def _network(
    path: Path, weights: Weights, scale: int, device: str, tile: int | None, overlap: int | None, self_ensemble: bool
) -> tuple[Upscaler, list[str]]:
    """Load the network of a checkpoint and make an upscaler of it, and lines that say what it is."""
    keep_freed_memory()
    checkpoint, network = open_network(path, weights, scale)
    place = pick_device(device)
    tiling = None if tile is None else choose_tiling(network, tile, overlap)
    heading = [f"{describe(checkpoint, network)}, on {place}"]
    if self_ensemble:
        heading.append("self-ensemble: the mean over 8 flips and quarter turns")
    if tiling is not None:
        heading.append(f"tiles of {tiling.tile} LR pixels, read with {tiling.overlap} more on each side")
    return network_upscaler(network.to(place), place, tiling=tiling, self_ensemble=self_ensemble), heading


def _pairs(hr: Path | None, lr: Path | None, shards: Path | None, scale: int, leave_out: LeaveOut) -> Iterator[Pair]:
    if shards is not None:
        return shard_pairs(ImageDataset(shards, scale))
    assert hr is not None
    return read_pairs(hr, lr, scale, leave_out)


def _make_folder(folder: Path, sources: Iterable[Path]) -> None:
    """Make the folder for results, which must not lie among the images that are read; ShardsError if it does."""
    place = folder.resolve()
    for source in sources:
        if place.is_relative_to(source.resolve()):
            raise ShardsError(
                one_line(f"{folder}: expected a folder for results outside {source}, which is read from, got one in it")
            )
    check_folder(folder)


def _line(name: str, scores: Scores) -> str:
    return " ".join([one_line(name), *(f"{value:.4f}" for value in astuple(scores))])


def _numbers(scores: Scores) -> dict[str, float | None]:
    """The scores by name, what JSON has no number for as None."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(scores).items()}


def _say(line: str) -> None:
    click.echo(one_line(line))


def _silent(line: str) -> None:
    """Say nothing."""
