"""Verifying and repairing whole datasets, in parallel threads."""

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from loader.errors import ShardsError
from loader.format.layout import Index
from loader.system.limits import startable_threads
from loader.system.threads import in_threads
from prep.shard.checksums import Finding, Tick, check_length, check_shard
from prep.shard.hdf5 import check_hdf5
from prep.verify.compare import compare_image
from prep.verify.repair import repair_folder, repair_shard
from prep.verify.sources import SourceImages

Item = TypeVar("Item")
Result = TypeVar("Result")
Report = Callable[[int], None]


class _Stopped(Exception):  # noqa: N818
    """Work in progress is no longer wanted."""


def check_shards(
    folder: Path, index: Index, numbers: Sequence[int], workers: int, quick: bool, report: Report
) -> list[Finding]:
    """Check shards against the index and return the findings.

    Args:
        folder: of the dataset.
        index: the dataset's.
        numbers: of the shards to check.
        workers: threads; reading and checksums release the interpreter lock.
        quick: check only lengths and the structure of HDF5 files, without reading pixels.
        report: called with the number of planes of images checked, or of shards if `quick`.
    """

    def check(number: int, tick: Tick) -> Iterable[Finding]:
        if quick:
            findings = list(check_length(folder, index, number))
            tick()
        else:
            findings = check_shard(folder, index, number, tick)
        # Keep files known to be damaged away from libhdf5.
        if index.container == "hdf5" and all(finding.image is not None for finding in findings):
            findings += check_hdf5(folder, index, number)
        return findings

    return _in_threads(check, numbers, workers, report)


def compare_images(
    folder: Path, index: Index, sources: SourceImages, known: Sequence[Finding], workers: int, report: Report
) -> list[Finding]:
    """Compare all stored images with their sources and return new findings, besides those in `known`.

    `report` is called with the number of images compared.
    """
    bad = {(finding.image, finding.level) for finding in known}
    # Nothing is read from a shard of the wrong length.
    unreadable = {number for number in {finding.shard for finding in known} if any(check_length(folder, index, number))}

    def compare(image: int, tick: Tick) -> Iterable[Finding]:
        skip = {scale for scale in index.planes if (image, scale) in bad or int(index.shard[image]) in unreadable}
        findings = compare_image(folder, index, image, sources, skip)
        tick()
        return findings

    return _in_threads(compare, range(len(index.name)), workers, report)


def repair_shards(
    folder: Path, index: Index, sources: SourceImages, numbers: Sequence[int], workers: int, report: Report
) -> dict[int, str | None]:
    """Rebuild shards from their sources; return for each number why the shard could not be repaired, None if it was.

    The caller must hold the folder's lock. `report` is called with the number of images done.

    Raises:
        OSError: the folder cannot be written to.
    """

    def repair(number: int, tick: Tick) -> Iterable[tuple[int, str | None]]:
        try:
            repair_shard(folder, workspace, index, number, sources, tick)
        except ShardsError as error:
            return [(number, str(error))]
        remaining = check_shards(folder, index, [number], 1, False, lambda done: None)
        return [(number, remaining[0].text if remaining else None)]

    with repair_folder(folder) as workspace:
        return dict(_in_threads(repair, numbers, workers, report))


def _in_threads(
    work: Callable[[Item, Tick], Iterable[Result]], items: Sequence[Item], workers: int, report: Report
) -> list[Result]:
    """Return the results for all items, in order. Work in progress ends at its next tick if this is interrupted."""
    done, running, guard = 0, True, threading.Lock()

    def tick() -> None:
        nonlocal done
        with guard:
            if not running:
                raise _Stopped
            done += 1
            report(done)

    def stop() -> None:
        nonlocal running
        with guard:
            running = False

    # in_threads may repeat an item if a thread fails to start, but a shard must not be repaired twice at once: ask only
    # for threads that will start.
    results = in_threads(lambda item: list(work(item, tick)), items, startable_threads(workers), stop)
    return [result for some in results for result in some]
