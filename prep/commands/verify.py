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
    from prep.verify.sources import SourceImages


@click.command()
@click.argument("folder", metavar="DIR", type=GivenPath())
@click.option("--workers", type=click.IntRange(min=1), help="Threads.  [default: one per core]")
@click.option("--quick", is_flag=True, help="Check index, lengths and HDF5 structure only; read no pixels.")
@click.option(
    "--source", "sources", type=GivenPath(exists=True), multiple=True,
    help="Compare with these images; may be repeated.",
)  # fmt: skip
@click.option("--lr", type=GivenPath(exists=True), help="The LR images, if they were given.")
@click.option("--repair", is_flag=True, help="Rebuild damaged shards from the images of --source.")
def verify(
    folder: Path, workers: int | None, quick: bool, sources: tuple[Path, ...], lr: Path | None, repair: bool
) -> None:
    """Check the dataset at DIR, to the last byte.

    Each shard is read once, to check its length, SHA-256, the CRC-32 of every image in every plane, padding, and HDF5
    structure. With --source, pixels are compared with the images, and LR with newly made LR. Each line of output is a
    finding; the last line is a summary. The exit code is 1 if anything is wrong and was not repaired.
    """
    if repair and not sources:
        raise click.UsageError("--repair needs --source, the images to build from")
    if lr and not sources:
        raise click.UsageError("--lr needs --source, the HR images")
    if quick and sources:
        raise click.UsageError("--quick reads no pixels, so it cannot be combined with --source")
    from loader.format.index import read_index_alone
    from prep.console.progress import Progress
    from prep.images.decoders import configure_decoders
    from prep.verify.sources import SourceImages
    from prep.verify.verify import check_shards, compare_images
    from prep.workspace.workspace import Workspace

    configure_decoders()
    start = time.monotonic()
    workers = workers or len(os.sched_getaffinity(0))
    try:
        index = read_index_alone(folder)
    except ShardsError as error:
        hint = "; an index cannot be repaired: rebuild the dataset with build-shards --overwrite" if repair else ""
        raise ShardsError(f"{error}{hint}") from None
    count, images = len(index.shards), len(index.name)
    with Progress(count if quick else images * len(index.planes), "shard" if quick else "plane") as progress:
        damage = check_shards(folder, index, range(count), workers, quick, progress)
    source_images = SourceImages(sources, lr)
    differences: list[Finding] = []
    if sources:
        with Progress(images, "image") as progress:
            differences = compare_images(folder, index, source_images, damage, workers, progress)
    for finding in sorted(damage + differences, key=lambda finding: finding.shard):
        click.echo(one_line(finding.text))
    repaired = 0
    if repair and damage:
        problems = _repair(folder, index, source_images, sorted({finding.shard for finding in damage}), workers)
        for number, problem in problems.items():
            outcome = f"not repaired: {problem}" if problem else "repaired"
            click.echo(one_line(f"{folder / index.shards[number].file}: {outcome}"))
        damage = [finding for finding in damage if problems[finding.shard]]
        repaired = list(problems.values()).count(None)
    findings = damage + differences
    verdict = (
        _verdict(findings, index, source_images if sources else None, quick) + Workspace(folder).describe_skipped()
    )
    if repaired:
        verdict = f"{repaired} shards repaired, {verdict}"
    size, seconds = sum(shard.bytes for shard in index.shards) / 1e6, time.monotonic() - start
    click.echo(one_line(f"{folder}: {images} images in {count} shards, {size:.1f} MB, {seconds:.1f} s: {verdict}"))
    if findings:
        sys.exit(1)


def _repair(
    folder: Path, index: Index, sources: "SourceImages", numbers: list[int], workers: int
) -> dict[int, str | None]:
    from prep.console.progress import Progress
    from prep.verify.verify import repair_shards
    from prep.workspace.workspace import Workspace

    images = sum(int((index.shard == number).sum()) for number in numbers)
    try:
        with Workspace(folder).locked(tell), Progress(images, "image") as progress:
            return repair_shards(folder, index, sources, numbers, workers, progress)
    except OSError as error:
        raise ShardsError(f"{error.filename or folder}: could not be written: {error.strerror or error}") from None


def _verdict(findings: "list[Finding]", index: Index, sources: "SourceImages | None", quick: bool) -> str:
    wrong = [finding for finding in findings if finding.compared]
    if wrong:
        verdict = f"{len(wrong)} findings in {len({finding.shard for finding in wrong})} shards"
    elif quick:
        verdict = "lengths and HDF5 structure match the index; pixels were not read"
    elif sources is None:
        verdict = "everything matches the index"
    else:
        verdict = "everything matches the index and the sources"
        if not sources.covers(index):
            verdict += ", except the given LR (compare it with --lr)"
    if not_compared := len(findings) - len(wrong):
        verdict = f"{verdict if wrong else 'no damage found'}; {not_compared} images could not be compared"
    return verdict
