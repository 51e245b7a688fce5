"""One build at a time in a folder, its workers included.

Two bytes of the lock's file are locked: the first by the build, the second, shared, by each of its worker processes. So
a build begins when the workers of one that was killed have ended, too.
"""

import errno
import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loader.errors import ShardsError
from loader.system.lockfile import held, lock_byte, open_lock

LOCK = "build.lock"
WORKERS = 1  # the byte that workers lock
PATIENCE = 30.0  # seconds for the workers of a build that was killed to end


@contextmanager
def locked(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a folder; its file is gone afterwards.

    A file system without locks is told of by `note`, and the build goes on without.

    Raises:
        ShardsError: another build holds it.
        OSError: the lock's file cannot be written.
    """
    with held(folder / LOCK, "build", _await_workers) as remark:
        if remark:
            note(remark)
        yield


def share_lock(folder: Path) -> None:
    """Take a worker's share in the lock of its build, until the process ends.

    Raises:
        OSError: another build is about to begin.
    """
    try:
        descriptor = open_lock(folder / LOCK, create=False)
    except ShardsError as error:  # it was replaced since
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
