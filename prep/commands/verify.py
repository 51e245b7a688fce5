"""The `verify` command."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loader.errors import ShardsError, one_line
from loader.format.layout import Index
from prep.console.paths import GivenPath
from prep.console.unix import tell

if TYPE_CHECKING:
    from prep.shard.checksums import Finding
    from prep.verify.sources import Originals


@click.command()
@click.argument("folder", metavar="DIR", type=GivenPath())
@click.option("--workers", type=click.IntRange(min=1), help="Threads.  [default: one per core]")
@click.option("--quick", is_flag=True, help="Index, lengths and HDF5 structure only: no pixel is read.")
@click.option(
    "--source", "sources", type=GivenPath(exists=True), multiple=True,
    help="Compare with the images there; may repeat.",
)  # fmt: skip
@click.option("--lr", type=GivenPath(exists=True), help="The LR images, where they were given.")
@click.option("--repair", is_flag=True, help="Build bad shards again, from the images of --source.")
def verify(
    folder: Path, workers: int | None, quick: bool, sources: tuple[Path, ...], lr: Path | None, repair: bool
) -> None:
    """Is the dataset at DIR what was built, to the last byte?

    Every shard is read once: its length, its SHA-256, the CRC-32 of each image in each plane, its padding, and the
    structure of HDF5 files. With --source the pixels are compared with the images, LR made anew. Each line of output
    is something wrong; the last one sums up. Exit code 1 if anything is wrong, and was not repaired.
    """
    if repair and not sources:
        raise click.UsageError("--repair needs --source, the images to build from")
    if lr and not sources:
        raise click.UsageError("--lr needs --source, the HR images")
    if quick and sources:
        raise click.UsageError("--quick reads no pixels: it goes without --source")
    from loader.format.index import read_index_alone
    from prep.console.progress import Progress
    from prep.verify.sources import Originals
    from prep.verify.verify import check_shards, compare_images
    from prep.workspace.workspace import Workspace

    start = time.monotonic()
    workers = workers or len(os.sched_getaffinity(0))
    try:
        index = read_index_alone(folder)
    except ShardsError as error:
        hint = "; an index cannot be repaired: build-shards --overwrite makes the dataset anew" if repair else ""
        raise ShardsError(f"{error}{hint}") from None
    originals, repaired = Originals(sources, lr), 0
    count, images = len(index.shards), len(index.name)
    with Progress(count if quick else images * len(index.planes), "shard" if quick else "plane") as progress:
        damage = check_shards(folder, index, range(count), workers, quick, progress)
    different: list[Finding] = []
    if sources:
        with Progress(images, "image") as progress:
            different = compare_images(folder, index, originals, damage, workers, progress)
    for finding in sorted(damage + different, key=lambda finding: finding.shard):
        click.echo(one_line(finding.text))
    if repair and damage:
        results = _repair(folder, index, originals, sorted({finding.shard for finding in damage}), workers)
        for number, problem in results.items():
            path = folder / index.shards[number].file
            click.echo(one_line(f"{path}: " + (f"not repaired: {problem}" if problem else "repaired")))
        damage = [finding for finding in damage if results[finding.shard]]
        repaired = list(results.values()).count(None)
    findings = damage + different
    seconds = time.monotonic() - start
    size = sum(shard.bytes for shard in index.shards) / 1e6
    wrong = [finding for finding in findings if finding.compared]
    if wrong:
        verdict = f"{len(wrong)} findings in {len({finding.shard for finding in wrong})} shards"
    elif quick:
        verdict = "lengths and structure as recorded; pixels were not read"
    else:
        verdict = "all as recorded" + (" and as the sources have it" if sources else "")
        if sources and not originals.has_all(index):
            verdict += ", but for the LR, which was given: --lr compares it"
    if left := len(findings) - len(wrong):
        verdict = f"{verdict if wrong else 'nothing wrong found'}; {left} images could not be compared"
    verdict += Workspace(folder).describe_skipped()
    if repaired:
        verdict = f"{repaired} shards repaired, {verdict}"
    click.echo(one_line(f"{folder}: {images} images in {count} shards, {size:.1f} MB, {seconds:.1f} s: {verdict}"))
    if findings:
        sys.exit(1)


def _repair(
    folder: Path, index: Index, originals: "Originals", numbers: list[int], workers: int
) -> dict[int, str | None]:
    from prep.console.progress import Progress
    from prep.verify.verify import repair_shards
    from prep.workspace.workspace import Workspace

    images = sum(int((index.shard == number).sum()) for number in numbers)
    try:
        with Workspace(folder).locked(tell), Progress(images, "image") as progress:
            return repair_shards(folder, index, originals, numbers, workers, progress)
    except OSError as error:
        raise ShardsError(f"{error.filename or folder}: could not be written: {error.strerror or error}") from None
