"""Options that several commands have, and what they mean."""

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
