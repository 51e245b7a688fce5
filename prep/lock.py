"""One build at a time in a folder: a lock that ends with the process that holds it, over NFS too.

POSIX record locks (fcntl) are the kernel's, or the NFS server's: a dead process holds none. Two bytes of the file are
locked: the first by the build, the second, shared, by each of its worker processes. So a build begins when the workers
of one that was killed have ended, too. The file's text tells a person who holds it; it proves nothing.
"""

import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loader.format import ShardsError, one_line
from loader.safefile import describe_kind

LOCK = "build.lock"
BUILD, WORKERS = 0, 1  # the bytes that are locked
LONGEST = 4096  # bytes of the text in it
SHOWN = 300  # characters of that which are shown
PATIENCE = 30.0  # seconds for the workers of a build that was killed to end
_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a folder; its file is gone afterwards.

    A file system without locks is told of by `note`, and the build goes on without.

    Raises:
        ShardsError: another build holds it.
        OSError: the lock's file cannot be written.
    """
    path = folder / LOCK
    descriptor = _open(path, note)
    try:
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
        yield
    finally:
        if _is(path, descriptor):
            path.unlink(missing_ok=True)  # before the lock is let go: nobody else's file is removed
        os.close(descriptor)


def share_lock(folder: Path) -> None:
    """Take a worker's share in the lock of its build, until the process ends.

    Raises:
        OSError: another build is about to begin.
    """
    try:
        descriptor = _file(folder / LOCK, 0)
    except ShardsError as error:  # it was replaced since
        raise OSError(errno.EPERM, str(error)) from None
    _lock(descriptor, fcntl.LOCK_SH, WORKERS)


def _open(path: Path, note: Callable[[str], None]) -> int:
    """A descriptor of the lock's file with the lock on it."""
    while True:
        descriptor = _file(path, os.O_CREAT)
        try:
            if not _lock(descriptor, fcntl.LOCK_EX, BUILD):
                note(f"{path.parent}: this file system has no locks: see to it that no other build writes here")
            elif not _is(path, descriptor):  # its holder removed it just now
                os.close(descriptor)
                continue
            _await_workers(descriptor)
            return descriptor
        except OSError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            if error.errno not in _TAKEN:
                raise
            raise ShardsError(f"{path.parent}: expected no other build at work there, got {holder}") from None


def _file(path: Path, create: int) -> int:
    """Open the lock's file, or make it.

    Raises:
        ShardsError: it is anything but a small file of one name: whose it is, and what it holds, is then not ours.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | create | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise ShardsError(f"{path}: expected a lock's file, got {_kind(path)}") from None
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1 and found.st_size <= LONGEST:  # no name: just removed
        return descriptor
    os.close(descriptor)
    got = f"one of {found.st_nlink} names and {found.st_size} bytes"
    raise ShardsError(f"{path}: expected a lock's file, got {got if stat.S_ISREG(found.st_mode) else _kind(path)}")


def _kind(path: Path) -> str:
    try:
        mode = path.lstat().st_mode
    except OSError:
        return "none"
    return "a link" if stat.S_ISLNK(mode) else describe_kind(mode)


def _await_workers(descriptor: int) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            _lock(descriptor, fcntl.LOCK_EX, WORKERS)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            _lock(descriptor, fcntl.LOCK_UN, WORKERS)
            return


def _lock(descriptor: int, kind: int, byte: int) -> bool:
    """Lock or unlock a byte at once; False: there are no locks here.

    Raises:
        OSError: another process has it.
    """
    try:
        fcntl.lockf(descriptor, kind if kind == fcntl.LOCK_UN else kind | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _is(path: Path, descriptor: int) -> bool:
    """Whether a path still names an open file."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    """Who has the lock, as its file says: the text of anyone who can write there."""
    try:
        found = json.loads(os.pread(descriptor, LONGEST, 0))
        return one_line(f"process {int(found['pid'])} on {found['host']}, since {found['since']}")[:SHOWN]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return "one that has just begun"
