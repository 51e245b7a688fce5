"""PSNR and SSIM of a network, or of bicubic enlargement, on test images: `python -m model.evaluate`.

Test images are a folder of HR, with LR from a second folder or made by MATLAB's bicubic, or a dataset of shards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import click

from loader import ImageDataset
from loader.errors import ShardsError, one_line
from loader.format.layout import SCALES
from loader.system.safefile import write_atomically
from model.device import pick_device
from model.enlarge.allocator import keep_freed_memory
from model.enlarge.networks import describe, open_network
from model.enlarge.options import (
    Weights,
    choose_tiling,
    device_option,
    ensemble_option,
    overlap_option,
    weights_option,
)
from model.enlarge.outputs import check_output, check_output_folder
from model.enlarge.pictures import Picture, encode_picture
from model.enlarge.upscalers import Upscaler, bicubic_upscaler, network_upscaler
from model.evaluate.pairs import ImagePair, LeaveOut, large_enough, read_pairs, shard_pairs
from model.evaluate.scoring import score_pairs
from model.evaluate.sheet import Row, make_row, write_sheet
from model.metrics import Scores, mean_scores
from prep.console.errors import errors_as_messages
from prep.console.paths import GivenPath
from prep.console.progress import Progress
from prep.console.unix import UnixCommand, tell
from prep.images.decoders import configure_decoders


@dataclass(frozen=True)
class Options:
    """The command's options; raises click.UsageError for invalid combinations."""

    hr: Path | None
    lr: Path | None
    shards: Path | None
    scale: int
    checkpoint: Path | None
    bicubic: bool
    weights: Weights
    self_ensemble: bool
    tile: int | None
    overlap: int | None
    save: Path | None
    sheet: Path | None
    sheet_rows: int
    as_json: bool
    device: str

    def __post_init__(self) -> None:
        if self.bicubic == (self.checkpoint is not None):
            raise click.UsageError("give either --checkpoint FILE or --bicubic")
        if (self.hr is None) == (self.shards is None):
            raise click.UsageError("give either --hr DIR or --shards DIR")
        if self.lr is not None and self.shards is not None:
            raise click.UsageError("--lr goes with --hr; --shards holds LR")
        if self.bicubic and (self.self_ensemble or self.tile is not None or self.sheet is not None):
            raise click.UsageError("--self-ensemble, --tile and --sheet need --checkpoint")
        if self.overlap is not None and self.tile is None:
            raise click.UsageError("--overlap needs --tile")
        if self.scale not in SCALES:
            raise click.BadParameter(f"expected one of {SCALES}, got {self.scale}", param_hint="'--scale'")
        if self.sheet is not None and self.sheet.suffix.lower() != ".png":
            raise click.BadParameter(
                one_line(f"expected a name that ends in .png, got {self.sheet.name!r}"), param_hint="'--sheet'"
            )


@click.command(cls=UnixCommand)
@click.option("--hr", type=GivenPath(), help="Folder of HR images.")
@click.option("--lr", type=GivenPath(), help="Folder of LR images.  [default: made from HR]")
@click.option("--shards", type=GivenPath(), help="Dataset of shards instead of --hr and --lr.")
@click.option("--scale", type=int, required=True, help="2, 3, 4 or 8.")
@click.option("--checkpoint", type=GivenPath(), help="Checkpoint to evaluate.")
@click.option("--bicubic", is_flag=True, help="Evaluate MATLAB's bicubic enlargement instead.")
@weights_option
@ensemble_option
@click.option("--tile", type=click.IntRange(min=1), help="Tile size in LR pixels.  [default: whole images]")
@overlap_option
@click.option("--save", type=GivenPath(), help="Folder for the enlarged images, NAME_x4.png.")
@click.option("--sheet", type=GivenPath(), help="PNG file for crops of LR, bicubic, the network and HR side by side.")
@click.option("--sheet-rows", type=click.IntRange(min=1), default=8, show_default=True, help="Images on the sheet.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; infinite PSNR becomes null.")
@device_option
def main(**options: Any) -> None:
    """Print PSNR and SSIM in RGB and on MATLAB's Y, per image and on average.

    A border of SCALE pixels is cropped first. Images too small to be scored are reported and excluded from the mean;
    the exit code is 1 only if none remains.
    """
    chosen = Options(**options)
    configure_decoders()
    with errors_as_messages():
        evaluate(chosen)


def evaluate(options: Options) -> None:
    """Score the test images, print the scores and write the requested files.

    Raises ShardsError for unusable inputs or outputs, OSError if a file cannot be written.
    """
    scale = options.scale
    check_outputs(options)
    upscale, notes = choose_upscaler(options)
    notes.append(f"LR {lr_source(options)}, scale {scale}")
    notes.append(f"border cropped before scoring: {scale} pixels on each side")
    say = _silent if options.as_json else _say
    for line in [*notes, "image PSNR-RGB SSIM-RGB PSNR-Y SSIM-Y"]:
        say(line)
    left_out: dict[str, str] = {}
    rows: list[Row] = []
    collected: dict[str, Scores] = {}
    with Progress(None, "image") as progress:

        def leave_out(name: str, reason: str) -> None:
            left_out[name] = reason
            progress.note(one_line(f"image {name} left out: {reason}"))

        for result in score_pairs(upscale, large_enough(open_pairs(options, leave_out), scale, leave_out), scale):
            pair, name = result.pair, result.pair.name
            if options.save is not None:
                path = options.save / f"{name}_x{scale}.png"
                write_atomically(path, encode_picture(Picture(result.sr), path))
            if options.sheet is not None and len(rows) < options.sheet_rows:
                rows.append(make_row(name, pair.lr, result.sr, bicubic_upscaler(scale)(pair.lr), pair.hr, scale))
            collected[name] = result.scores
            if not options.as_json:
                progress.print(_line(name, result.scores))
            progress(len(collected))
    if not collected:
        raise ShardsError(f"expected at least one image that can be scored, got {len(left_out)} that are too small")
    mean = mean_scores(collected.values())
    if left_out:
        tell(f"mean of {len(collected)} images; {len(left_out)} left out as too small")
    say(_line("mean", mean))
    if options.sheet is not None:
        write_sheet(rows, options.sheet)
    if options.as_json:
        images = {name: _numbers(scores) for name, scores in collected.items()}
        facts = {"notes": notes, "scale": scale, "border": scale, "images": images, "mean": _numbers(mean)}
        facts["left_out"] = left_out
        click.echo(json.dumps(facts, indent=1, ensure_ascii=False))


def check_outputs(options: Options) -> None:
    """Check, before the slow part, that the output files can be written; see `model.enlarge.outputs`."""
    inputs = [path for path in (options.hr, options.lr, options.shards, options.checkpoint) if path is not None]
    if options.save is not None:
        check_output_folder(options.save, inputs)
    if options.sheet is not None:
        check_output(options.sheet, inputs)


def choose_upscaler(options: Options) -> tuple[Upscaler, list[str]]:
    """Return an upscaler, bicubic or the checkpoint's network, and lines that describe it."""
    if options.checkpoint is None:
        return bicubic_upscaler(options.scale), ["MATLAB's bicubic enlargement"]
    keep_freed_memory()
    checkpoint, network = open_network(options.checkpoint, options.weights, options.scale)
    device = pick_device(options.device)
    tiling = None if options.tile is None else choose_tiling(network, options.tile, options.overlap)
    notes = [f"{describe(checkpoint, network)}, on {device}"]
    if options.self_ensemble:
        notes.append("self-ensemble: mean over the 8 flips and quarter turns")
    if tiling is not None:
        notes.append(f"tiles of {tiling.tile} LR pixels with an overlap of {tiling.overlap}")
    ensemble = options.self_ensemble
    return network_upscaler(network.to(device), device, tiling=tiling, self_ensemble=ensemble), notes


def lr_source(options: Options) -> str:
    """Return a phrase for where LR images come from."""
    if options.shards is not None:
        return f"from shards {options.shards}"
    return "made from HR by MATLAB's bicubic" if options.lr is None else f"from {options.lr}"


def open_pairs(options: Options, leave_out: LeaveOut) -> Iterator[ImagePair]:
    """Open the test images; see `model.evaluate.pairs`."""
    if options.shards is not None:
        return shard_pairs(ImageDataset(options.shards, options.scale))
    assert options.hr is not None
    return read_pairs(options.hr, options.lr, options.scale, leave_out)


def _line(name: str, scores: Scores) -> str:
    return " ".join([one_line(name), *(f"{value:.4f}" for value in astuple(scores))])


def _numbers(scores: Scores) -> dict[str, float | None]:
    """Return the scores by name; None for infinity and NaN, which JSON lacks."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(scores).items()}


def _say(line: str) -> None:
    click.echo(one_line(line))


def _silent(line: str) -> None:
    """Print nothing."""
