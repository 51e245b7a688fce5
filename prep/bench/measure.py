"""Measurements of a dataset's storage: latency, scattered reads, and patches per second, cold and warm."""

import errno
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np

from loader.ahead.budget import READ_BUFFERS
from loader.ahead.pipeline import Pipeline, default_readahead
from loader.ahead.positional import READ_THREADS
from loader.ahead.reader import open_reader
from loader.errors import ShardsError
from loader.format.layout import CHANNELS, HR, PAGE, Index
from loader.pixels.files import open_shard
from loader.pixels.shards import Shards
from loader.pixels.tiles import Pixels
from loader.plan import Crops, Plan
from loader.system.filesystem import file_system, is_network
from loader.system.free_memory import available_memory
from loader.system.limits import startable_threads
from loader.system.threads import in_threads
from prep.bench.report import IO_MODES, IoMode, Measurements, Workload

REQUEST = 64 << 10  # bytes: about one row of tiles of an HR crop
WARM_BATCHES = 8


def measure(folder: Path, workload: Workload, seconds: float) -> Measurements:
    """Measure for about `seconds` in all. An io mode that does not work here is recorded as not measured.

    Raises:
        ShardsError: the folder holds no dataset with that scale or no image large enough, or it cannot be read.
    """
    shards = Shards(folder)
    shards.check_scale(workload.scale)
    plan = Plan(*shards.index.sizes(workload.scale), workload.lr_patch, seed=int(time.time()), augment=True)
    if not plan.positions:
        side = workload.lr_patch * workload.scale
        raise ShardsError(
            f"{folder}: expected an image of at least {side} × {side} pixels for this patch size, got none"
        )
    try:
        return _measure(shards, plan, workload, seconds)
    except OSError as error:
        raise ShardsError(f"{folder}: expected readable storage, got {error.strerror or error}") from None


def _measure(shards: Shards, plan: Plan, workload: Workload, seconds: float) -> Measurements:
    folder, index, part = shards.folder, shards.index, seconds / 7
    # At most half of the dataset: beyond that, crops would hit pages that earlier crops read.
    side = workload.lr_patch * workload.scale
    fresh = max(1, int(index.height @ index.width) // (2 * side * side * workload.batch_size))
    evicted = evict(shards)
    latency = read_latency(folder, index, part / 2)
    evict(shards)
    random_rate = read_rate(folder, index, part)
    rates: dict[IoMode, tuple[float, float]] = {}
    not_measured: dict[str, str] = {}
    for number, io in enumerate(IO_MODES):
        if text := short_of_memory(index, workload, io) or (short_of_threads(workload) if io == "pread" else None):
            not_measured[io] = text
            continue
        evict(shards)
        # Each io mode draws from an epoch of its own, so that no crop was read before.
        draws = (partial(_draw, plan, number, step, workload.batch_size) for step in range(fresh))
        again = cycle([partial(_draw, plan, 9, step, workload.batch_size) for step in range(WARM_BATCHES)])
        try:
            cold = patch_rate(folder, workload, io, draws, part)
            rates[io] = cold, patch_rate(folder, workload, io, again, part, skip=WARM_BATCHES)
        except (ShardsError, MemoryError, RuntimeError) as error:
            # Files that cannot be mapped (FUSE with direct_io), or limits on address space or threads (ulimit).
            not_measured[io] = str(error) or "not enough memory"
    if not rates:
        reasons = [f"io={io!r}: {reason}" for io, reason in not_measured.items()]
        raise ShardsError("\n  ".join([f"{folder}: expected an io mode that works, got none:", *reasons]))
    return Measurements(
        file_system=file_system(folder),
        network=is_network(folder),
        dataset_bytes=sum(shard.bytes for shard in index.shards),
        free_memory=available_memory() or 0,
        latency_ms=latency * 1000,
        random_mb_per_second=random_rate / 1e6,
        evicted=evicted,
        cold={io: cold for io, (cold, _) in rates.items()},
        warm={io: warm for io, (_, warm) in rates.items()},
        needed=workload.patches_per_second,
        not_measured=not_measured,
    )


def short_of_memory(index: Index, workload: Workload, io: IoMode, free: int | None = None) -> str | None:
    """Return why memory does not suffice for an io mode, or None if it does.

    Mapped pages do not count, since the system can drop them; positional reads hold the tiles of each batch read ahead.

    Args:
        index: the dataset's.
        workload: what to read.
        io: how to read it.
        free: bytes of free memory; None asks the system.
    """
    sides = {HR: workload.lr_patch * workload.scale, workload.scale: workload.lr_patch}
    crops = workload.batch_size * CHANNELS * sum(side**2 for side in sides.values())
    tiles = workload.batch_size * CHANNELS * sum((side + 2 * index.planes[s].tile) ** 2 for s, side in sides.items())
    ahead = default_readahead(workload.batch_size) + workload.threads + 2
    wanted = (workload.threads + 3) * crops + (ahead * tiles if io == "pread" else 0)
    free = available_memory() if free is None else free
    if free is None or wanted <= free:
        return None
    return f"expected {wanted / 1e6:,.0f} MB of memory, got {free / 1e6:,.0f} MB; a smaller --batch-size needs less"


def short_of_threads(workload: Workload) -> str | None:
    """Return why the threads for positional reads cannot all start, or None if they can."""
    wanted = workload.threads + 2 + READ_THREADS
    found = startable_threads(wanted)
    return None if found == wanted else f"expected room for {wanted} threads, got {found} (see ulimit -u and -v)"


def evict(shards: Shards) -> float | None:
    """Ask the system to drop the shards' pages; return the fraction of sampled pages that are gone, None if unknown."""
    rng = np.random.default_rng(0)
    gone: list[bool] = []
    for number, shard in enumerate(shards.index.shards):
        descriptor = open_shard(shards.folder, shards.index, number)
        try:
            with suppress(OSError):  # some file systems do not support it
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
    """Return the median time in seconds of sequentially issued, scattered reads of one page."""
    times = []
    end = time.perf_counter() + seconds
    with closing(_scattered(folder, index, PAGE)) as reads:
        for descriptor, offset in reads:
            start = time.perf_counter()
            os.pread(descriptor, PAGE, offset)
            times.append(time.perf_counter() - start)
            if time.perf_counter() > end or len(times) == 1000:
                break
    return statistics.median(times)


def read_rate(folder: Path, index: Index, seconds: float) -> float:
    """Return the bytes per second of scattered reads of REQUEST bytes, READ_THREADS at once."""

    def read(number: int) -> int:
        done = 0
        with closing(_scattered(folder, index, REQUEST, number)) as reads:
            for descriptor, offset in reads:
                done += len(os.pread(descriptor, REQUEST, offset))
                if time.perf_counter() - start > seconds:
                    break
        return done

    threads = startable_threads(READ_THREADS)
    start = time.perf_counter()
    total = sum(in_threads(read, range(max(threads, 1)), threads))
    return total / (time.perf_counter() - start)


def patch_rate(
    folder: Path, workload: Workload, io: IoMode, draws: Iterator[Callable[[], Crops]], seconds: float, skip: int = 0
) -> float:
    """Return the patches per second that the loader delivers over `seconds`, after the first `skip` batches."""
    reader = open_reader(Shards(folder), workload.scale, workload.lr_patch, io, memory_limit=READ_BUFFERS)
    readahead = default_readahead(workload.batch_size)
    batches_done, start = -skip, time.perf_counter()

    def take(shape: tuple[int, ...]) -> tuple[None, Pixels]:
        return None, np.empty(shape, np.uint8)

    with closing(Pipeline(reader, draws, lambda draw: draw(), readahead, workload.threads, take)) as batches:
        for _ in batches:
            batches_done += 1
            if batches_done == 0:
                start = time.perf_counter()
            elif batches_done > 0 and time.perf_counter() - start > seconds:
                break
    return batches_done * workload.batch_size / (time.perf_counter() - start)


def _scattered(folder: Path, index: Index, size: int, seed: int = 0) -> Generator[tuple[int, int], None, None]:
    """Yield descriptors and random page-aligned offsets over all shards, endlessly; repeats are unlikely."""
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
