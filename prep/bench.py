"""Will my storage keep up? What a dataset's storage gives, what training needs, and what to do about it."""

import errno
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Literal

import numpy as np

from loader.files import open_shard
from loader.format import PAGE, Index, ShardsError
from loader.pipeline import Pipeline, default_readahead
from loader.plan import Crops, Plan
from loader.positional import READ_THREADS
from loader.readahead import open_reader
from loader.room import Room
from loader.shards import Shards
from loader.storage import file_system, is_network
from loader.tiles import Pixels

MARGIN = 1.2  # storage that gives this times what is needed keeps up
REQUEST = 64 << 10  # bytes: about what one row of tiles of an HR crop takes
WARM_BATCHES = 8
Way = Literal["mmap", "pread"]


@dataclass(frozen=True)
class Need:
    """A training run: what it takes in one step, and how long a step is."""

    scale: int
    lr_patch: int
    batch_size: int
    step_ms: float
    threads: int

    @property
    def patches_per_second(self) -> float:
        """The rate at which such a run takes patches."""
        return self.batch_size / self.step_ms * 1000


@dataclass(frozen=True)
class Report:
    """What was measured. Rates are patches per second, by way of reading; `forgotten` is the share of pages that left
    the page cache when asked to, None where the system does not tell: cold figures are only cold if it is near 1."""

    file_system: str
    network: bool
    dataset_bytes: int
    free_memory: int
    latency_ms: float
    random_mb_per_second: float
    forgotten: float | None
    cold: dict[str, float]
    warm: dict[str, float]
    needed: float

    @property
    def chosen(self) -> Way:
        """The way that io="auto" takes here."""
        return "pread" if self.network else "mmap"


def measure(folder: Path, need: Need, seconds: float) -> Report:
    """Measure for about so many seconds.

    Raises:
        ShardsError: the folder holds no dataset with that scale, or no image large enough.
    """
    shards = Shards(folder)
    shards.need_scale(need.scale)
    plan = Plan(*shards.index.sizes(need.scale), need.lr_patch, seed=int(time.time()), augment=True)
    if not plan.positions:
        side = need.lr_patch * need.scale
        raise ShardsError(f"{folder}: expected an image of {side} × {side} pixels or more for such patches, got none")
    index, share = shards.index, seconds / 7
    # Half of the dataset at most: soon after that, crops would come from pages that others brought.
    side = need.lr_patch * need.scale
    fresh = max(1, int(shards.index.height @ shards.index.width) // (2 * side * side * need.batch_size))
    forgotten = forget(shards)
    latency = read_latency(folder, index, share / 2)
    forget(shards)
    random_rate = read_rate(folder, index, share)
    cold: dict[str, float] = {}
    warm: dict[str, float] = {}
    ways: tuple[Way, ...] = ("mmap", "pread")
    for number, way in enumerate(ways):
        forget(shards)
        # Each trial draws from an epoch of its own: no crop was read before.
        draws = (partial(_draw, plan, number, step, need.batch_size) for step in range(fresh))
        cold[way] = patch_rate(folder, need, way, draws, share)
    for way in ways:
        again = cycle([partial(_draw, plan, 9, step, need.batch_size) for step in range(WARM_BATCHES)])
        warm[way] = patch_rate(folder, need, way, again, share, skip=WARM_BATCHES)
    return Report(
        file_system=file_system(folder),
        network=is_network(folder),
        dataset_bytes=sum(shard.bytes for shard in index.shards),
        free_memory=_free_memory(),
        latency_ms=latency * 1000,
        random_mb_per_second=random_rate / 1e6,
        forgotten=forgotten,
        cold=cold,
        warm=warm,
        needed=need.patches_per_second,
    )


def forget(shards: Shards) -> float | None:
    """Ask the system to drop the shards' pages; the share of some pages that are gone, None where it does not tell."""
    rng = np.random.default_rng(0)
    gone: list[bool] = []
    for number, shard in enumerate(shards.index.shards):
        descriptor = open_shard(shards.folder, shards.index, number)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            for offset in rng.integers(0, shard.bytes, 8):
                try:
                    os.preadv(descriptor, [bytearray(1)], int(offset), os.RWF_NOWAIT)
                    gone.append(False)
                except OSError as error:
                    if error.errno == errno.EAGAIN:
                        gone.append(True)
        finally:
            os.close(descriptor)
    return sum(gone) / len(gone) if gone else None


def read_latency(folder: Path, index: Index, seconds: float) -> float:
    """Seconds that a read of one page takes, one after the other: the median."""
    times = []
    end = time.perf_counter() + seconds
    with closing(_places(folder, index, PAGE)) as places:
        for descriptor, offset in places:
            start = time.perf_counter()
            os.pread(descriptor, PAGE, offset)
            times.append(time.perf_counter() - start)
            if time.perf_counter() > end or len(times) == 1000:
                break
    return statistics.median(times)


def read_rate(folder: Path, index: Index, seconds: float) -> float:
    """Bytes per second of scattered reads of REQUEST bytes, READ_THREADS at once."""
    start = time.perf_counter()

    def read(number: int) -> int:
        done = 0
        with closing(_places(folder, index, REQUEST, number)) as places:
            for descriptor, offset in places:
                done += len(os.pread(descriptor, REQUEST, offset))
                if time.perf_counter() - start > seconds:
                    break
        return done

    with ThreadPoolExecutor(READ_THREADS) as pool:
        total = sum(pool.map(read, range(READ_THREADS)))
    return total / (time.perf_counter() - start)


def patch_rate(
    folder: Path, need: Need, way: Way, draws: Iterator[Callable[[], Crops]], seconds: float, skip: int = 0
) -> float:
    """Patches per second that the loader gives in so many seconds, without the first `skip` batches."""
    room = Room()
    reader = open_reader(Shards(folder), need.scale, need.lr_patch, way, room=room)
    readahead = default_readahead(need.batch_size)
    given, start = -skip, time.perf_counter()

    def take(shape: tuple[int, ...]) -> tuple[None, Pixels]:
        return None, np.empty(shape, np.uint8)

    with closing(Pipeline(reader, draws, lambda draw: draw(), readahead, need.threads, take, room)) as batches:
        for _ in batches:
            given += 1
            if given == 0:
                start = time.perf_counter()
            elif given > 0 and time.perf_counter() - start > seconds:
                break
    return given * need.batch_size / (time.perf_counter() - start)


def advice(report: Report, folder: Path) -> str:
    """What a person had better do."""
    enough = report.needed * MARGIN
    if max(report.warm.values()) < report.needed:
        return (
            "Even from memory, the loader gives fewer patches than training takes: give it more threads "
            "(PatchLoader(threads=..), train.py --workers), or check what else runs here."
        )
    if report.cold[report.chosen] >= enough:
        return f'Fine as it is: io="auto" ({report.chosen} here) keeps up even when nothing is cached.'
    other = "pread" if report.chosen == "mmap" else "mmap"
    if report.cold[other] >= enough:
        return f'Use io="{other}": that way this storage keeps up even when nothing is cached.'
    minutes = report.dataset_bytes / (report.random_mb_per_second * 1e6) / 60
    copy = f'cp -r {folder} "$TMPDIR"/    # about {minutes:.1f} minutes at the rate measured'
    if report.dataset_bytes < report.free_memory * 0.8:
        return (
            "The first epoch will wait for the storage; later ones come from memory, into which the dataset fits. To "
            f"avoid the wait, copy it to node-local storage first:\n  {copy}"
        )
    return f"This storage is too slow for this training, and memory too small. Copy to node-local storage:\n  {copy}"


def report_lines(report: Report, need: Need, folder: Path) -> list[str]:
    """The report for a person."""
    kind = "counts as network" if report.network else "counts as local disk"
    lines = [
        f"{folder}: {report.dataset_bytes / 1e9:.2f} GB on {report.file_system}, which {kind}",
        f"latency             {report.latency_ms:.2f} ms for a scattered read of 4 KiB",
        f"scattered reads     {report.random_mb_per_second:.0f} MB/s, 64 KiB each, {READ_THREADS} at once",
    ]
    lines += [f"patches/s, cold     {rate:,.0f} with io={way!r}" for way, rate in report.cold.items()]
    lines += [f"patches/s, warm     {rate:,.0f} with io={way!r}" for way, rate in report.warm.items()]
    lines.append(
        f"training takes      {report.needed:,.0f} patches/s: batches of {need.batch_size} in {need.step_ms:g} ms"
    )
    if report.forgotten is not None and report.forgotten < 0.9:
        lines.append(
            f"({1 - report.forgotten:.0%} of the pages stayed in memory, in use elsewhere: cold figures are too good)"
        )
    return [*lines, advice(report, folder)]


def _places(folder: Path, index: Index, size: int, seed: int = 0) -> Generator[tuple[int, int], None, None]:
    """Descriptors and page-aligned offsets, scattered over all shards, for ever; each is likely to be new."""
    rng = np.random.default_rng([time.time_ns(), seed])
    lengths = np.array([shard.bytes for shard in index.shards])
    descriptors: dict[int, int] = {}
    try:
        while True:
            number = int(rng.choice(len(lengths), p=lengths / lengths.sum()))
            if number not in descriptors:
                descriptors[number] = open_shard(folder, index, number)
            pages = max(int(lengths[number]) - size, 0) // PAGE + 1
            yield descriptors[number], int(rng.integers(pages)) * PAGE
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _draw(plan: Plan, epoch: int, step: int, batch_size: int) -> Crops:
    return plan.crops(epoch, np.arange(step * batch_size, (step + 1) * batch_size))


def _free_memory() -> int:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable"))
