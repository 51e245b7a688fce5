"""Our own ways, and the limit: a plain memcpy of the same number of bytes."""

import ctypes
import operator
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, repeat
from typing import Any

import numpy as np
from crops import Task
from reading import Pixels, Start, Way, buffers, by_batch

from loader import PatchDataset, PatchLoader
from loader.ahead.footprint import PatchSize
from loader.ahead.reader import Io
from loader.format.layout import HR

NO_KERNELS = (("SRSHARDS_KERNELS", "0"),)
TOGETHER = "memory"  # process in which memcpy and the gather take turns with the same buffers


def open_memcpy(task: Task) -> Start:
    """Copy each crop's bytes as one block, from its image in the mapped shards to the batch buffers."""
    data, crops = task.dataset(), task.crops()
    pieces: list[list[Any]] = []
    targets: list[list[Any]] = []
    for plane, side, out in zip((task.scale, HR), task.sides, buffers(task.batch_size, *task.sides), strict=True):
        size = side * side * 3
        targets.append([crop.reshape(-1).data for crop in out])
        pieces.append([])
        for image, top, left in zip(crops.image.tolist(), crops.top.tolist(), crops.left.tolist(), strict=True):
            run = data.shards.tiles(image, plane).reshape(-1)
            start = (top * 509 + left) * 997 % (len(run) - size)
            pieces[-1].append(run[start : start + size].data)

    def read(samples: range, lr: Pixels, hr: Pixels) -> None:
        # Assigning a slice to a memoryview is a memcpy, and map calls it without Python code in between.
        for target, piece in zip(targets, pieces, strict=True):
            moved = map(operator.setitem, target, repeat(slice(None)), piece[samples.start : samples.stop])
            deque(moved, maxlen=0)

    return by_batch(task, read)


def open_memcpy_together(task: Task) -> Start:
    """Copy on two threads, half a batch each, through ctypes, which releases the GIL."""
    data, crops = task.dataset(), task.crops()
    planes: list[tuple[int, list[int], int]] = []
    for plane, side, out in zip((task.scale, HR), task.sides, buffers(task.batch_size, *task.sides), strict=True):
        size, last = side * side * 3, data.shards.index.run_lengths(plane)[crops.image] - side * side * 3
        index = data.shards.index
        run = data.shards.addresses(index.shard[crops.image]) + index.planes[plane].offset[crops.image]
        pieces = run + (crops.top * 509 + crops.left) * 997 % last
        planes.append((out.ctypes.data, pieces.tolist(), size))
    pool = ThreadPoolExecutor(2)

    def copy(samples: range, first: int) -> None:
        for target, pieces, size in planes:
            for k, n in enumerate(samples, first):
                ctypes.memmove(target + k * size, pieces[n], size)

    def read(samples: range, lr: Pixels, hr: Pixels, mapped: PatchDataset = data) -> None:  # keeps it mapped
        half = len(samples) // 2
        for part in [pool.submit(copy, samples[:half], 0), pool.submit(copy, samples[half:], half)]:
            part.result()

    return by_batch(task, read)


def open_gather(task: Task, transforms: bool = False, threads: int = 1) -> Start:
    """Call Shards.gather for both planes, with crops drawn beforehand; several threads share a batch."""
    data = task.dataset(augment=transforms)
    crops = data.plan.crops(0, np.arange(len(task.numbers)))
    patch = PatchSize(task.scale, task.lr_patch)

    def gather(samples: range, lr: Pixels, hr: Pixels) -> None:
        for plane, out in zip(patch.in_planes(crops[samples.start : samples.stop]), (lr, hr), strict=True):
            data.shards.gather(plane, out)

    if threads == 1:
        return by_batch(task, gather)
    pool = ThreadPoolExecutor(threads)

    def gather_together(samples: range, lr: Pixels, hr: Pixels) -> None:
        edges = [len(samples) * i // threads for i in range(threads + 1)]
        parts = [pool.submit(gather, samples[a:b], lr[a:b], hr[a:b]) for a, b in pairwise(edges)]
        for part in parts:
            part.result()

    return by_batch(task, gather_together)


def open_dataset(task: Task, augment: bool = False) -> Start:
    """Read batches from PatchDataset as torch's DataLoader does; includes drawing crops and allocating memory."""
    data: PatchDataset = task.dataset(augment)
    return by_batch(task, lambda samples, lr, hr: data.__getitems__(samples))


def open_loader(task: Task, augment: bool = False, threads: int = 0, io: Io = "auto") -> Start:
    """Read with PatchLoader, a new iterator for each start; threads: 0 for its default."""
    data = task.dataset(augment)
    options: dict[str, Any] = {"threads": threads} if threads else {}
    loaders = {
        endless: PatchLoader(data, task.batch_size, epochs=None if endless else 1, io=io, **options)
        for endless in (False, True)
    }

    def start(endless: bool) -> Iterator[int]:
        for lr, _ in loaders[endless]:
            yield len(lr)

    return start


MEMCPY = Way(
    "memcpy",
    "shards",
    open_memcpy,
    "as many bytes, each crop in one piece out of the mapped shards into kept buffers, one C call after another",
    process=TOGETHER,
)
MEMCPY_ALL = Way(
    "memcpy, 2 threads",
    "shards",
    open_memcpy_together,
    "the same by two threads, half a batch each, on all cores: what the memory gives both",
    all_cores=True,
)
GATHER = Way(
    "ours: gather alone",
    "shards",
    open_gather,
    "Shards.gather for both planes into the same buffers, crops drawn before",
    process=TOGETHER,
)
GATHER_TURNED = Way(
    "ours: gather with transforms",
    "shards",
    lambda task: open_gather(task, transforms=True),
    "the same with the 8 transforms, on the host",
    process=TOGETHER,
)
GATHER_PLAIN = Way(
    "ours: gather, fallback",
    "shards",
    open_gather,
    "Shards.gather without the compiled kernel",
    environment=NO_KERNELS,
)
GATHER_ALL = Way(
    "ours: gather alone, 2 threads",
    "shards",
    lambda task: open_gather(task, threads=2),
    "Shards.gather by two threads, half a batch each, on all cores",
    all_cores=True,
)
DATASET = Way(
    "ours: PatchDataset",
    "shards",
    open_dataset,
    "PatchDataset.__getitems__, a batch at a time, crops drawn and memory taken included; no transforms",
)
DATASET_TURNED = Way(
    "ours: PatchDataset, transforms",
    "shards",
    lambda task: open_dataset(task, augment=True),
    "the same with augment=True",
)
LOADER_1 = Way(
    "ours: PatchLoader, 1 core",
    "shards",
    lambda task: open_loader(task, threads=1),
    "PatchLoader(threads=1), begun anew in each round; no transforms",
)
LOADER_1_TURNED = Way(
    "ours: PatchLoader, 1 core, transforms",
    "shards",
    lambda task: open_loader(task, augment=True, threads=1),
    "the same with augment=True",
)
LOADER_ALL = Way(
    "ours: PatchLoader, 2 threads",
    "shards",
    lambda task: open_loader(task, threads=2),
    "PatchLoader(threads=2) on all cores; no transforms",
    all_cores=True,
)
LOADER_ALL_TURNED = Way(
    "ours: PatchLoader, 2 threads, transforms",
    "shards",
    lambda task: open_loader(task, augment=True, threads=2),
    "the same with augment=True",
    all_cores=True,
)
LOADER_AUTO = Way("ours: PatchLoader", "shards", open_loader, 'PatchLoader as it is, io="auto"')
LOADER_MMAP = Way(
    "ours: PatchLoader, mmap", "shards", lambda task: open_loader(task, io="mmap"), 'PatchLoader(io="mmap")'
)
LOADER_PREAD = Way(
    "ours: PatchLoader, pread", "shards", lambda task: open_loader(task, io="pread"), 'PatchLoader(io="pread")'
)
