"""Command-line options shared by several commands."""

from __future__ import annotations

from typing import Literal

import click

from model.enlarge.receptive_field import receptive_radius
from model.enlarge.tiles import Tiling
from model.shufflemixer import ShuffleMixer

Weights = Literal["ema", "raw"]

weights_option = click.option(
    "--weights",
    type=click.Choice(["ema", "raw"]),
    default="ema",
    show_default=True,
    help="Weights to use if the checkpoint has both.",
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
ensemble_option = click.option(
    "--self-ensemble", is_flag=True, help="Average over the 8 flips and quarter turns: slightly better, 8 times slower."
)
overlap_option = click.option(
    "--overlap",
    type=click.IntRange(min=0),
    help="LR pixels read around each tile.  [default: the network's receptive radius]",
)


def choose_tiling(network: ShuffleMixer, tile: int, overlap: int | None) -> Tiling:
    """Return tiles of size `tile`, by default with the overlap that leaves no seams; warn if `overlap` is smaller.

    Raises click.UsageError if the network's receptive radius is unknown and `overlap` is None.
    """
    radius = receptive_radius(network)
    if radius is None:
        if overlap is None:
            raise click.UsageError("--tile needs --overlap: the receptive radius of this edited network is unknown")
        return Tiling(tile, overlap)
    if overlap is not None and overlap < radius:
        click.echo(
            f"warning: --overlap {overlap} is below the network's receptive radius of {radius} pixels; expect seams",
            err=True,
        )
    return Tiling(tile, radius if overlap is None else overlap)
