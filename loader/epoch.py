"""The epoch that a dataset draws from, and whether it draws the same crops again: known to all of its processes.

Both lie in memory that forked, spawned and persistent DataLoader workers share. It is an anonymous file (memfd), which
needs no /dev/shm. Where the system gives none, forked workers still share the memory; others are told that they do not.
"""

import contextlib
import fcntl
import mmap
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from multiprocessing.reduction import DupFd, ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TRACKED = 1 << 20  # samples of an epoch, the first ones, for which it is known whether they were drawn
FEW = 32  # repeats that are never worth a word: looking at one sample, several times
SLOTS = 64  # counters: no two of a dataset's workers should write to the same one
HEAD = 8 * (2 + 2 * SLOTS)  # bytes: epoch, whether the warning was given, and the counters


class EpochState:
    """The epoch of a dataset of `length` samples, and a record of those drawn in it.

    Args:
        length: samples in an epoch.
        record: keep the record; without it nothing is ever called a repeat.
        epoch: the first one.
    """

    def __init__(self, length: int, record: bool, epoch: int = 0) -> None:
        self._use(create(HEAD + (min(length, TRACKED) if record else 0)))
        self.epoch = epoch

    def _use(self, memory: "tuple[mmap.mmap, int | None]") -> None:
        mapped, self._descriptor = memory
        if self._descriptor is not None:
            weakref.finalize(self, os.close, self._descriptor)
        words = np.frombuffer(mapped, np.int64, HEAD // 8)
        self._words, self._counts = words[:2], words[2:].reshape(SLOTS, 2)  # counts: draws, repeats among them
        self._seen = np.frombuffer(mapped, np.uint8, offset=HEAD)

    @property
    def epoch(self) -> int:
        """The epoch; setting it begins a new record, be it to the same one: who sets it knows what is drawn."""
        return int(self._words[0])

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._words[0] = epoch
        self._counts[:] = 0
        self._seen[:] = 0

    def repeats(self, samples: NDArray[np.int64]) -> bool:
        """Record samples as drawn, and tell, once, that crops are being drawn all over again.

        It takes more than looking at a batch before training, or drawing with replacement: half an epoch drawn again,
        or, where only a part of it is ever drawn, that part two and a half times.
        """
        if not len(self._seen) or self._words[1]:
            return False
        samples = samples[samples < len(self._seen)]
        fresh = np.unique(samples[self._seen[samples] == 0])
        self._seen[fresh] = 1
        self._counts[os.getpid() % SLOTS] += (len(samples), len(samples) - len(fresh))
        draws, again = self._counts.sum(0).tolist()
        if again < min(FEW, len(self._seen)):
            return False
        return 2 * again >= min(len(self._seen), 3 * (draws - again)) and self._first()

    def _first(self) -> bool:
        """Whether nobody was first before, in this process or another."""
        if not _first.acquire(blocking=False):
            return False
        try:
            if self._descriptor is not None:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                first = not self._words[1]
                self._words[1] = 1
                return first
            finally:
                if self._descriptor is not None:
                    fcntl.lockf(self._descriptor, fcntl.LOCK_UN)
        except OSError:  # another process is at it
            return False
        finally:
            _first.release()

    def __reduce__(self) -> tuple[Callable[..., "EpochState"], tuple[Any, ...]]:
        """An ordinary pickle, or a copy, begins a record of its own."""
        return EpochState, (len(self._seen), bool(len(self._seen)), self.epoch)

    def _shared(self) -> tuple[Callable[..., "EpochState"], tuple[Any, ...]]:
        """What is handed to another process by multiprocessing shares the memory."""
        if self._descriptor is not None:
            return _attached, (DupFd(self._descriptor), HEAD + len(self._seen))
        warn("the system gives no memory to share with spawned workers: they draw from the epoch of their start, "
             "whatever set_epoch says; fork them, or make a new DataLoader for each epoch")  # fmt: skip
        return self.__reduce__()


_first = threading.Lock()
ForkingPickler.register(EpochState, EpochState._shared)


def create(size: int) -> tuple[mmap.mmap, int | None]:
    """Return memory of `size` bytes, all 0, to share with children, and its descriptor; None: with forked ones only."""
    try:
        descriptor = os.memfd_create("srshards-epoch", os.MFD_CLOEXEC)
    except OSError:
        return mmap.mmap(-1, size), None
    try:
        os.ftruncate(descriptor, size)
        return mmap.mmap(descriptor, size), descriptor
    except OSError:
        os.close(descriptor)
        return mmap.mmap(-1, size), None


def _attached(handle: Any, size: int) -> EpochState:
    state, descriptor = EpochState.__new__(EpochState), handle.detach()
    try:
        state._use((mmap.mmap(descriptor, size), descriptor))
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise
    return state


def warn(text: str) -> None:
    """Give a UserWarning at the line that called into this package."""
    here, level, frame = Path(__file__).parent, 1, sys._getframe()
    while frame.f_back is not None and Path(frame.f_code.co_filename).parent == here:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UserWarning, stacklevel=level)
