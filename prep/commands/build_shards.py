"""The `build-shards` command."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from loader.errors import ShardsError
from loader.format.layout import BORDERS, CONTAINERS, RESIZES, SCALES
from prep.console.paths import GivenPath
from prep.console.unix import tell

DEFAULT_SOURCE = Path("datasets/DIV2K/DIV2K_train_HR")
WITH_SKIPS = 3  # exit code if images were skipped


@click.command("build-shards")
@click.argument("sources", metavar="[SOURCE]...", nargs=-1, type=GivenPath())
@click.option(
    "--scale",
    "scales",
    type=click.IntRange(min=1),
    multiple=True,
    required=True,
    help="Scale of LR: 2, 3, 4 or 8. Repeat for several.",
)
@click.option("--out", type=GivenPath(), help="Dataset folder.  [default: shards/<source name>]")
@click.option(
    "--format", "container", type=click.Choice(list(CONTAINERS)), default="hdf5", help="Container of the shards."
)
@click.option("--tile", type=int, default=64, help="HR tile size in pixels, a multiple of 16.")
@click.option("--images-per-shard", type=int, help="[default: images / 16, at least 8, at most 64]")
@click.option(
    "--lr",
    type=GivenPath(),
    help="Store given LR images, named DIR/X4/NAMEx4.png or DIR/NAMEx4.png, instead of making LR.",
)
@click.option(
    "--resize", type=click.Choice(RESIZES), default=RESIZES[0], help="MATLAB's imresize, of uint8 or of im2double."
)
@click.option(
    "--border",
    type=click.Choice(BORDERS),
    default=BORDERS[0],
    help="Border of imresize: symmetric since MATLAB R2015b, replicate before.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Worker processes.  [default: one per core]")
@click.option(
    "--max-pixels", type=click.IntRange(min=1), default=1 << 28, help="Reject images with more pixels than this."
)
@click.option(
    "--on-error",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    help="Fail if an image cannot be used, or skip it.",
)
@click.option(
    "--retry-skipped", is_flag=True, help="Retry the images skipped before; skip those that are still unusable."
)
@click.option("--overwrite", is_flag=True, help="Replace any dataset in the folder, once the new one is complete.")
@click.option("--sample", is_flag=True, help="Use scikit-image's sample photographs.")
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

    SOURCE: folders, searched recursively, or image files. The default is datasets/DIV2K/DIV2K_train_HR. The dataset
    holds HR, and LR for each --scale. Run the same command again to resume an interrupted build, or to check a complete
    dataset.
    """
    if wrong := sorted(set(scales) - set(SCALES)):
        raise click.UsageError(f"--scale: expected some of {', '.join(map(str, SCALES))}, got {wrong[0]}")
    if sample and (sources or lr):
        raise click.UsageError("--sample takes neither SOURCE nor --lr")
    if len(sources) > 1 and out is None:
        raise click.UsageError("--out is required with several SOURCEs")
    from prep.build.build import build_dataset
    from prep.build.check import describe_skipped
    from prep.console.interrupts import interruptible
    from prep.console.progress import Progress
    from prep.images.decoders import configure_decoders
    from prep.images.find import find_images
    from prep.plan.dataset import default_images_per_shard, plan_dataset
    from prep.plan.recipe import Recipe
    from prep.workspace.workspace import Workspace

    configure_decoders()
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
    with interruptible() as check_interrupt, Progress(len(images), "image") as progress:

        def report(done: int) -> None:
            progress(done)
            check_interrupt()

        summary = build_dataset(
            plan,
            _cores() if workers is None else workers,
            skip_bad=on_error == "skip",
            overwrite=overwrite,
            report=report,
            note=tell,
            retry=retry_skipped,
        )
    seconds = time.monotonic() - start
    count = len(summary.index.name)
    state = "already complete; all checksums match: " if summary.checked else ""
    click.echo(
        f"{folder}: {state}{count} images in {len(summary.index.shards)} shards, {summary.bytes / 1e6:.1f} MB, "
        f"{seconds:.1f} s, {count / seconds:.1f} images/s"
    )
    if summary.skipped:
        lines, name = describe_skipped(plan, summary.skipped), Workspace(folder).skipped.name
        head = f"skipped {len(lines)} images (also listed in {name}; --retry-skipped retries them):"
        tell("\n  ".join([head, *lines]))
        sys.exit(WITH_SKIPS)


def _sources(sources: tuple[Path, ...], sample: bool) -> list[Path]:
    if sample:
        from prep.images.sample import sample_photographs

        return sample_photographs()
    if sources or DEFAULT_SOURCE.exists():
        return list(sources or [DEFAULT_SOURCE])
    raise ShardsError(
        f"{DEFAULT_SOURCE}: expected the DIV2K training images, the default SOURCE, got nothing; "
        "name a folder of images, or use --sample for scikit-image's photographs"
    )


def _default_name(source: Path) -> str:
    """Return the full name of a folder (`data.v1` differs from `data.v2`), or the stem of an image file."""
    real = source.resolve()
    if not (name := real.name if real.is_dir() else real.stem):
        raise click.UsageError(f"--out is required with {source}, which has no name")
    return name


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
