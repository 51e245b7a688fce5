"""The `build-shards` command."""

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import click

from loader.errors import ShardsError
from loader.format.layout import BORDERS, CONTAINERS, RESIZES, SCALES
from prep.console.paths import GivenPath
from prep.console.unix import tell

DEFAULT_SOURCE = Path("datasets/DIV2K/DIV2K_train_HR")
WITH_SKIPS = 3  # exit code of a build that left images out


@click.command("build-shards")
@click.argument("sources", metavar="[SOURCE]...", nargs=-1, type=GivenPath())
@click.option(
    "--scale", "scales", type=click.IntRange(min=1), multiple=True, required=True, help="Of 2, 3, 4, 8; may repeat."
)
@click.option("--out", type=GivenPath(), help="Folder of the dataset.  [default: shards/<folder name>]")
@click.option("--format", "container", type=click.Choice(list(CONTAINERS)), default="hdf5", help="Kind of shards.")
@click.option("--tile", type=int, default=64, help="Side of HR tiles in pixels, a multiple of 16.")
@click.option("--images-per-shard", type=int, help="[default: a sixteenth of the images, but 8 to 64]")
@click.option("--lr", type=GivenPath(), help="Pack LR images given as DIR/X4/NAMEx4.png or DIR/NAMEx4.png.")
@click.option(
    "--resize", type=click.Choice(RESIZES), default=RESIZES[0], help="MATLAB's imresize of uint8, or of im2double."
)
@click.option("--border", type=click.Choice(BORDERS), default=BORDERS[0], help="Of MATLAB since R2015b, or before.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one per core]")
@click.option("--max-pixels", type=click.IntRange(min=1), default=1 << 28, help="An image of more is bad.")
@click.option("--on-error", type=click.Choice(["fail", "skip"]), default="fail", help="What to do about a bad image.")
@click.option(
    "--retry-skipped", is_flag=True, help="Try images again that were left out before; leave out those still bad."
)
@click.option("--overwrite", is_flag=True, help="Replace what is in the folder, once the new dataset is complete.")
@click.option("--sample", is_flag=True, help="Take the photographs that scikit-image carries.")
def build_shards(
    sources: tuple[Path, ...],
    scales: tuple[int, ...],
    out: Path | None,
    container: str,
    tile: int,
    images_per_shard: int | None,
    lr: Path | None,
    resize: str,
    border: Any,
    workers: int | None,
    max_pixels: int,
    on_error: str,
    retry_skipped: bool,
    overwrite: bool,
    sample: bool,
) -> None:
    """Build a dataset of shards from images.

    SOURCE: folders (with all folders in them) or image files; without any, datasets/DIV2K/DIV2K_train_HR. HR is
    stored beside LR of each --scale. The same command again goes on with a build that was stopped, and checks a dataset
    that is complete.
    """
    if wrong := sorted(set(scales) - set(SCALES)):
        raise click.UsageError(f"--scale: expected some of {', '.join(map(str, SCALES))}, got {wrong[0]}")
    if sample and (sources or lr):
        raise click.UsageError("--sample takes neither sources nor --lr")
    if len(sources) > 1 and out is None:
        raise click.UsageError("--out is required with several sources")
    from prep.build.build import build_dataset
    from prep.build.check import describe_skipped
    from prep.console.progress import Progress
    from prep.images.find import find_images
    from prep.plan.dataset import default_images_per_shard, plan_dataset
    from prep.plan.recipe import Recipe
    from prep.workspace.workspace import Workspace

    start = time.monotonic()
    paths = _sources(sources, sample)
    images = find_images(paths, tell)
    folder = Path("shards", "sample" if sample else _default_name(paths[0])) if out is None else out
    recipe = Recipe(
        scales=tuple(sorted(set(scales))),
        container=container,
        tile=tile,
        images_per_shard=default_images_per_shard(len(images)) if images_per_shard is None else images_per_shard,
        resize=resize,
        border=border,
        given_lr=lr is not None,
        max_pixels=max_pixels,
    )
    plan = plan_dataset(images, recipe, folder, lr, tell)
    signal.signal(signal.SIGTERM, _interrupt)
    with Progress(len(images), "image") as progress:
        summary = build_dataset(
            plan,
            _cores() if workers is None else workers,
            skip_bad=on_error == "skip",
            overwrite=overwrite,
            report=progress,
            note=tell,
            retry=retry_skipped,
        )
    seconds = time.monotonic() - start
    count = len(summary.index.name)
    state = "complete already, and unharmed: " if summary.checked else ""
    click.echo(
        f"{folder}: {state}{count} images in {len(summary.index.shards)} shards, {summary.bytes / 1e6:.1f} MB, "
        f"{seconds:.1f} s, {count / seconds:.1f} images/s"
    )
    if summary.skipped:
        lines, name = describe_skipped(plan, summary.skipped), Workspace(folder).skipped.name
        head = f"left out {len(lines)}, also listed in {name} (--retry-skipped tries them again):"
        tell("\n  ".join([head, *lines]))
        sys.exit(WITH_SKIPS)


def _sources(sources: tuple[Path, ...], sample: bool) -> list[Path]:
    if sample:
        from prep.images.sample import sample_photographs

        return sample_photographs()
    if sources or DEFAULT_SOURCE.exists():
        return list(sources or [DEFAULT_SOURCE])
    raise ShardsError(
        f"{DEFAULT_SOURCE}: expected the DIV2K training images there, since no SOURCE was named, got nothing; "
        "name a folder of images, or try --sample, which takes the photographs of scikit-image"
    )


def _default_name(source: Path) -> str:
    """The whole name of a folder (`data.v1` is not `data.v2`), or the stem of an image file."""
    real = source.resolve()
    if not (name := real.name if real.is_dir() else real.stem):
        raise click.UsageError(f"--out is required with {source}, which has no name")
    return name


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End on SIGTERM as on Ctrl-C: workers are stopped, and half shards removed."""
    raise KeyboardInterrupt
