"""What the commands here share: the options that choose a network and a device, and what they mean."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import click

from loader.errors import ShardsError, one_line
from loader.system.safefile import open_exclusive
from model.checkpoints import Checkpoint, CheckpointError, load_checkpoint
from model.enlarge.tiles import Tiling, receptive_radius
from model.shufflemixer import ShuffleMixer

Weights = Literal["ema", "raw"]

weights_option = click.option(
    "--weights",
    type=click.Choice(["ema", "raw"]),
    default="ema",
    show_default=True,
    help="Which weights to take from a checkpoint that holds both.",
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
ensemble_option = click.option(
    "--self-ensemble", is_flag=True, help="Average over the 8 flips and quarter turns: a little better, 8 times slower."
)
overlap_option = click.option(
    "--overlap",
    type=click.IntRange(min=0),
    help="LR pixels read around each tile.  [default: as far as the network sees, for no seams at all]",
)


def open_network(path: Path, prefer: Weights, scale: int | None = None) -> tuple[Checkpoint, ShuffleMixer]:
    """Read a checkpoint and build its network, on the CPU; CheckpointError for one of another scale than `scale`."""
    checkpoint = load_checkpoint(path, prefer)
    if scale not in (None, checkpoint.config.scale):
        raise CheckpointError(f"{path}: expected a network for --scale {scale}, got one for {checkpoint.config.scale}")
    return checkpoint, checkpoint.build()


def describe(checkpoint: Checkpoint, network: ShuffleMixer) -> str:
    """Say in a line which weights these are, and of what network."""
    config = checkpoint.config
    return one_line(
        f"checkpoint {checkpoint.path}: weights {checkpoint.weights_key}, {network.parameter_count()} parameters, "
        f"{config.features} features, kernel {config.kernel_size}, {config.blocks} blocks"
    )


def check_output(path: Path, inputs: Iterable[Path]) -> None:
    """Hold, before the work begins, that a result can be written to `path`; make the folder that it is to lie in.

    Raises:
        ShardsError: it is one of the inputs or lies within one that is a folder, or something other than a file is
            there.
        OSError: its folder cannot be made or written to.
    """
    place = path.resolve()
    for source in inputs:
        if place == source.resolve() or (source.is_dir() and place.is_relative_to(source.resolve())):
            raise ShardsError(one_line(f"{path}: expected a place outside {source}, which is read from, got one in it"))
    if path.exists() and not path.is_file():
        raise ShardsError(one_line(f"{path}: expected a file or nothing there, got a folder or a device"))
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Make a folder, if need be, and try whether files can be written there; OSError if not."""
    folder.mkdir(parents=True, exist_ok=True)
    trial = folder / f".{secrets.token_hex(8)}.part"
    try:
        os.close(open_exclusive(trial))
        trial.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def choose_tiling(network: ShuffleMixer, tile: int, overlap: int | None) -> Tiling:
    """Give tiles of that size, by default with the overlap that makes them equal to the whole; else say so, aloud."""
    radius = receptive_radius(network)
    if radius is None:
        if overlap is None:
            raise click.UsageError("--tile needs --overlap: how far this edited network sees is not known")
        return Tiling(tile, overlap)
    if overlap is not None and overlap < radius:
        click.echo(
            f"--overlap {overlap} is less than the {radius} pixels that the network sees: tiles may seam", err=True
        )
    return Tiling(tile, radius if overlap is None else overlap)
