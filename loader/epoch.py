"""The current epoch of a dataset and a record of samples drawn in it, shared by all processes that use the dataset.

Both lie in memory shared by forked, spawned and persistent DataLoader workers: an anonymous file (memfd), which does
not need /dev/shm. Without memfd, only forked workers share it, and spawned workers trigger a warning.
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

TRACKED = 1 << 20  # leading samples of an epoch that are recorded
FEW = 32  # repeats that are always fine: inspecting one sample several times
SLOTS = 64  # counters; a dataset's workers should not share one
HEADER = 8 * (2 + 2 * SLOTS)  # bytes: epoch, whether a warning was issued, counters

REPEATED = (
    "{folder}: the same crops of epoch {epoch} are being drawn again. Call set_epoch(epoch) on the dataset before each "
    "epoch, or use PatchLoader, which advances by itself; for validation, PatchDataset(..., fixed=True) repeats the "
    "same crops without this warning"
)


class EpochState:
    """The epoch of a dataset, and a record of the samples drawn in it.

    Args:
        length: samples in an epoch.
        record: keep the record; without it nothing counts as a repeat.
        epoch: the initial epoch.
    """

    def __init__(self, length: int, record: bool, epoch: int = 0) -> None:
        self._use(create(HEADER + (min(length, TRACKED) if record else 0)))
        self.epoch = epoch

    def _use(self, memory: "tuple[mmap.mmap, int | None]") -> None:
        mapped, self._descriptor = memory
        if self._descriptor is not None:
            weakref.finalize(self, os.close, self._descriptor)
        words = np.frombuffer(mapped, np.int64, HEADER // 8)
        self._header, self._counts = words[:2], words[2:].reshape(SLOTS, 2)  # counts: draws, repeats among them
        self._seen = np.frombuffer(mapped, np.uint8, offset=HEADER)

    @property
    def epoch(self) -> int:
        """The current epoch; setting it, even to the same value, clears the record."""
        return int(self._header[0])

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._header[0] = epoch
        self._counts[:] = 0
        self._seen[:] = 0

    def repeats(self, samples: NDArray[np.int64]) -> bool:
        """Record samples as drawn; return True, once, if crops are being drawn repeatedly.

        Inspecting a batch before training and sampling with replacement do not count. Drawing half of an epoch again
        does; so does drawing a part of an epoch two and a half times, if nothing else is drawn.
        """
        if not len(self._seen) or self._header[1]:
            return False
        samples = samples[samples < len(self._seen)]
        fresh = np.unique(samples[self._seen[samples] == 0])
        self._seen[fresh] = 1
        self._counts[os.getpid() % SLOTS] += (len(samples), len(samples) - len(fresh))
        draws, again = self._counts.sum(0).tolist()
        if again < min(FEW, len(self._seen)):
            return False
        return 2 * again >= min(len(self._seen), 3 * (draws - again)) and self._claim_warning()

    def _claim_warning(self) -> bool:
        """Return True to the first caller in any process."""
        if not _claiming.acquire(blocking=False):
            return False
        try:
            if self._descriptor is not None:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                first = not self._header[1]
                self._header[1] = 1
                return first
            finally:
                if self._descriptor is not None:
                    fcntl.lockf(self._descriptor, fcntl.LOCK_UN)
        except OSError:  # another process holds the lock
            return False
        finally:
            _claiming.release()

    def __reduce__(self) -> tuple[Callable[..., "EpochState"], tuple[Any, ...]]:
        """A copy, or an ordinary pickle, has its own record."""
        return EpochState, (len(self._seen), bool(len(self._seen)), self.epoch)

    def _shared(self) -> tuple[Callable[..., "EpochState"], tuple[Any, ...]]:
        """A pickle made by multiprocessing, for another process, shares the memory."""
        if self._descriptor is not None:
            return _attached, (DupFd(self._descriptor), HEADER + len(self._seen))
        warn("memory cannot be shared with spawned workers on this system: they keep drawing from the epoch at their "
             "start and ignore set_epoch; fork workers instead, or make a new DataLoader for each epoch")  # fmt: skip
        return self.__reduce__()


_claiming = threading.Lock()
ForkingPickler.register(EpochState, EpochState._shared)


def create(size: int) -> tuple[mmap.mmap, int | None]:
    """Return zeroed memory to share with child processes, and its descriptor; None: with forked ones only."""
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
    """Issue a UserWarning for the line that called into this package."""
    here, level, frame = Path(__file__).parent, 1, sys._getframe()
    while frame.f_back is not None and Path(frame.f_code.co_filename).parent == here:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UserWarning, stacklevel=level)
