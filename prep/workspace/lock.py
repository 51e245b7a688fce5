"""The lock of a dataset folder.

Builds lock one byte of the lock file: a whole build exclusively, a part of a build shared, so that parts of one build
can run at once. Worker processes lock a second byte, shared. A build, or the first of several parts, starts only after
the workers of a killed build have ended, too; later parts cannot tell those from the workers of other parts.
"""

import enum
import errno
import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loader.errors import ShardsError
from loader.system.lockfile import held, lock_byte, open_lock

WORKERS = 1  # the byte that workers lock
PATIENCE = 30.0  # seconds to wait for the workers of a killed build, or, as a part, for the lock


class LockMode(enum.Enum):
    """How a build locks its folder."""

    WHOLE = "exclusive"
    PART = "shared"


@contextmanager
def locked(path: Path, mode: LockMode, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock whose file is at `path`; the last holder removes the file.

    If the file system has no locks, call `note` and continue without.

    Raises:
        ShardsError: another build holds the lock.
        OSError: the lock file cannot be written.
    """
    shared = PATIENCE if mode is LockMode.PART else None
    with held(path, "build", _await_workers, shared) as remark:
        if remark:
            note(remark)
        yield


def join_lock(path: Path) -> None:
    """Lock the workers' byte, until this process ends.

    Raises:
        OSError: another build is about to start.
    """
    try:
        descriptor = open_lock(path, create=False)
    except ShardsError as error:  # it has been replaced
        raise OSError(errno.EPERM, str(error)) from None
    lock_byte(descriptor, fcntl.LOCK_SH, WORKERS)


def _await_workers(descriptor: int) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            lock_byte(descriptor, fcntl.LOCK_EX, WORKERS)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            lock_byte(descriptor, fcntl.LOCK_UN, WORKERS)
            return
