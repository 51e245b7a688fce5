"""One training at a time in a folder: a lock that ends with the process that holds it.

POSIX record locks (fcntl) are the kernel's, or the NFS server's: a dead process holds none, and neither forked children
nor programs that they start inherit one. The file's text tells a person who holds it; it proves nothing.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loader.format import ShardsError, one_line
from loader.safefile import open_to_write

LOCK = "train.lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(folder: Path) -> Iterator[str | None]:
    """Hold the lock of a run's folder, which is made if need be; yield a remark where there are no locks.

    Afterwards the lock's file is gone, and so is the folder if nothing was written there.

    Raises:
        ShardsError: another training holds it.
        OSError: the folder or the lock's file cannot be written.
    """
    made = _make(folder)
    try:
        descriptor, remark = _open(folder / LOCK)
        try:
            holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
            with suppress(OSError):  # a full disk: the lock holds without its text
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
            yield remark
        finally:
            (folder / LOCK).unlink(missing_ok=True)  # before the lock is let go: nobody else's file is removed
            os.close(descriptor)
    finally:
        with suppress(OSError):  # not empty, or another process is faster
            for path in made:
                path.rmdir()


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; give those that were not there, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _open(path: Path) -> tuple[int, str | None]:
    """A descriptor of the lock's file with the lock on it, or with a remark that there are no locks."""
    while True:
        descriptor = open_to_write(path, os.O_RDWR)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor, f"{path.parent}: this file system has no locks: let no other training write here"
            holder = _holder(descriptor)
            os.close(descriptor)
            if error.errno not in _TAKEN:
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise ShardsError(f"{path.parent}: expected no other training at work there, got {holder}") from None
        if _is(path, descriptor):
            return descriptor, None
        os.close(descriptor)  # its holder removed it just now


def _is(path: Path, descriptor: int) -> bool:
    """Whether a path still names an open file."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return one_line(f"process {found['pid']} on {found['host']}, since {found['since']}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "one that has just begun"
