"""Will my storage keep up? What a dataset's storage gives; see prep.bench.advice for what follows from it."""

import errno
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
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
from prep.bench.advice import WAYS, Need, Report, Way

REQUEST = 64 << 10  # bytes: about what one row of tiles of an HR crop takes
WARM_BATCHES = 8


def measure(folder: Path, need: Need, seconds: float) -> Report:
    """Measure for about so many seconds. A way of reading that does not work here is left out, and said to be.

    Raises:
        ShardsError: the folder holds no dataset with that scale, or no image large enough; or it cannot be read.
    """
    shards = Shards(folder)
    shards.check_scale(need.scale)
    plan = Plan(*shards.index.sizes(need.scale), need.lr_patch, seed=int(time.time()), augment=True)
    if not plan.positions:
        side = need.lr_patch * need.scale
        raise ShardsError(f"{folder}: expected an image of {side} × {side} pixels or more for such patches, got none")
    try:
        return _measure(shards, plan, need, seconds)
    except OSError as error:
        raise ShardsError(f"{folder}: expected storage that can be read, got {error.strerror or error}") from None


def _measure(shards: Shards, plan: Plan, need: Need, seconds: float) -> Report:
    folder, index, share = shards.folder, shards.index, seconds / 7
    # Half of the dataset at most: soon after that, crops would come from pages that others brought.
    side = need.lr_patch * need.scale
    fresh = max(1, int(index.height @ index.width) // (2 * side * side * need.batch_size))
    forgotten = forget(shards)
    latency = read_latency(folder, index, share / 2)
    forget(shards)
    random_rate = read_rate(folder, index, share)
    rates: dict[Way, tuple[float, float]] = {}
    left_out: dict[str, str] = {}
    for number, way in enumerate(WAYS):
        if text := short_of_memory(index, need, way) or (short_of_threads(need) if way == "pread" else None):
            left_out[way] = text
            continue
        forget(shards)
        # Each trial draws from an epoch of its own: no crop was read before.
        draws = (partial(_draw, plan, number, step, need.batch_size) for step in range(fresh))
        again = cycle([partial(_draw, plan, 9, step, need.batch_size) for step in range(WARM_BATCHES)])
        try:
            cold = patch_rate(folder, need, way, draws, share)
            rates[way] = cold, patch_rate(folder, need, way, again, share, skip=WARM_BATCHES)
        except (ShardsError, MemoryError, RuntimeError) as error:
            # Files that cannot be mapped (FUSE with direct_io), or too little room for maps or threads (ulimit -v).
            left_out[way] = str(error) or "memory is short"
    if not rates:
        reasons = [f"io={way!r}: {reason}" for way, reason in left_out.items()]
        raise ShardsError("\n  ".join([f"{folder}: expected a way of reading that works, got none:", *reasons]))
    return Report(
        file_system=file_system(folder),
        network=is_network(folder),
        dataset_bytes=sum(shard.bytes for shard in index.shards),
        free_memory=available_memory() or 0,
        latency_ms=latency * 1000,
        random_mb_per_second=random_rate / 1e6,
        forgotten=forgotten,
        cold={way: cold for way, (cold, _) in rates.items()},
        warm={way: warm for way, (_, warm) in rates.items()},
        needed=need.patches_per_second,
        left_out=left_out,
    )


def short_of_memory(index: Index, need: Need, way: Way, free: int | None = None) -> str | None:
    """Why there is too little memory for a way of reading, None where there is enough.

    Mapped pages count for nothing, since the system drops them; positional reads keep the tiles of each batch ahead.

    Args:
        index, need, way: what is to be read, and how.
        free: bytes of memory there are; None: what the system says.
    """
    sides = {HR: need.lr_patch * need.scale, need.scale: need.lr_patch}
    crops = need.batch_size * CHANNELS * sum(side**2 for side in sides.values())
    tiles = need.batch_size * CHANNELS * sum((side + 2 * index.planes[s].tile) ** 2 for s, side in sides.items())
    ahead = default_readahead(need.batch_size) + need.threads + 2
    wanted = (need.threads + 3) * crops + (ahead * tiles if way == "pread" else 0)
    free = available_memory() if free is None else free
    if free is None or wanted <= free:
        return None
    return f"expected {wanted / 1e6:,.0f} MB of memory, got {free / 1e6:,.0f} MB; a smaller --batch-size needs less"


def short_of_threads(need: Need) -> str | None:
    """Why there cannot be the many threads that positional reads take; None where there can."""
    wanted = need.threads + 2 + READ_THREADS
    found = startable_threads(wanted)
    return None if found == wanted else f"expected room for {wanted} threads, got {found} (see ulimit -u and -v)"


def forget(shards: Shards) -> float | None:
    """Ask the system to drop the shards' pages; the share of some pages that are gone, None where it does not tell."""
    rng = np.random.default_rng(0)
    gone: list[bool] = []
    for number, shard in enumerate(shards.index.shards):
        descriptor = open_shard(shards.folder, shards.index, number)
        try:
            with suppress(OSError):  # not every file system takes advice
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

    threads = startable_threads(READ_THREADS)
    start = time.perf_counter()
    if threads == 0:
        return read(0) / (time.perf_counter() - start)
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, range(threads)))
    return total / (time.perf_counter() - start)


def patch_rate(
    folder: Path, need: Need, way: Way, draws: Iterator[Callable[[], Crops]], seconds: float, skip: int = 0
) -> float:
    """Patches per second that the loader gives in so many seconds, without the first `skip` batches."""
    reader = open_reader(Shards(folder), need.scale, need.lr_patch, way, memory_limit=READ_BUFFERS)
    readahead = default_readahead(need.batch_size)
    given, start = -skip, time.perf_counter()

    def take(shape: tuple[int, ...]) -> tuple[None, Pixels]:
        return None, np.empty(shape, np.uint8)

    with closing(Pipeline(reader, draws, lambda draw: draw(), readahead, need.threads, take)) as batches:
        for _ in batches:
            given += 1
            if given == 0:
                start = time.perf_counter()
            elif given > 0 and time.perf_counter() - start > seconds:
                break
    return given * need.batch_size / (time.perf_counter() - start)


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
