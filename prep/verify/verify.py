"""A whole dataset against its index, its sources, or both; bad shards repaired. Shards are checked side by side."""

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from loader.errors import ShardsError
from loader.format.layout import Index
from loader.system.limits import startable_threads
from prep.shard.checksums import Finding, Tick, check_length, check_shard
from prep.shard.hdf5 import check_hdf5
from prep.verify.repair import repair_shard, workshop
from prep.verify.sources import Originals, compare_image

Item = TypeVar("Item")
Result = TypeVar("Result")
Report = Callable[[int], None]


class Stopped(Exception):  # noqa: N818
    """Work that is no longer wanted."""


def check_shards(
    folder: Path, index: Index, numbers: Sequence[int], workers: int, quick: bool, report: Report
) -> list[Finding]:
    """What is wrong with shards.

    Args:
        folder: of the dataset.
        index: the dataset's.
        numbers: of the shards to check.
        workers: threads; reading and checksums hold no lock of the interpreter.
        quick: look at lengths, and at the structure of HDF5 files, only: pixels are not read, and not seen.
        report: is told how many planes of images are done, or shards if it is quick.
    """

    def check(number: int, tick: Tick) -> Iterable[Finding]:
        if quick:
            findings = list(check_length(folder, index, number))
            tick()
        else:
            findings = check_shard(folder, index, number, tick)
        # libhdf5 is not shown a file that is known to be damaged.
        if index.container == "hdf5" and all(finding.image is not None for finding in findings):
            findings += check_hdf5(folder, index, number)
        return findings

    return _side_by_side(check, numbers, workers, report)


def compare_images(
    folder: Path, index: Index, originals: Originals, known: Sequence[Finding], workers: int, report: Report
) -> list[Finding]:
    """Where the stored images differ from their sources, besides the findings that are known already.

    `report` is told how many images are done.
    """
    bad = {(finding.image, finding.level) for finding in known}
    # Of a shard of another length nothing is read.
    closed = {number for number in {finding.shard for finding in known} if any(check_length(folder, index, number))}

    def compare(image: int, tick: Tick) -> Iterable[Finding]:
        skip = {scale for scale in index.planes if (image, scale) in bad or int(index.shard[image]) in closed}
        findings = compare_image(folder, index, image, originals, skip)
        tick()
        return findings

    return _side_by_side(compare, range(len(index.name)), workers, report)


def repair_shards(
    folder: Path, index: Index, originals: Originals, numbers: Sequence[int], workers: int, report: Report
) -> dict[int, str | None]:
    """Build shards again from their sources; by number, why one could not be repaired, or None where it was.

    The caller sees to it that nobody else writes in the folder. `report` is told how many images are done.

    Raises:
        OSError: nothing can be written there.
    """

    def repair(number: int, tick: Tick) -> Iterable[tuple[int, str | None]]:
        try:
            repair_shard(folder, place, index, number, originals, tick)
        except ShardsError as error:
            return [(number, str(error))]
        left = check_shards(folder, index, [number], 1, False, lambda done: None)
        return [(number, left[0].text if left else None)]

    with workshop(folder) as place:
        return dict(_side_by_side(repair, numbers, workers, report))


def _side_by_side(
    work: Callable[[Item, Tick], Iterable[Result]], items: Iterable[Item], workers: int, report: Report
) -> list[Result]:
    """The results of all items, in order; an interrupt ends what is in work."""
    done, going, guard = 0, True, threading.Lock()

    def tick() -> None:
        nonlocal done
        with guard:
            if not going:
                raise Stopped
            done += 1
            report(done)

    if (threads := startable_threads(workers)) == 0:
        return [result for item in items for result in work(item, tick)]
    pool = ThreadPoolExecutor(threads)
    try:
        return [result for results in pool.map(lambda item: list(work(item, tick)), items) for result in results]
    finally:
        with guard:
            going = False
        pool.shutdown(cancel_futures=True)
