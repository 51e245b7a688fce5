"""The lock of a folder: a file locked by one process, or shared by several, until it ends; works on NFS.

POSIX record locks (fcntl) belong to the system or the NFS server: a dead process holds none, and child processes do not
inherit them. The text in the file names the holder, for users; it proves nothing.
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

from loader.errors import ShardsError, one_line
from loader.system.safefile import describe_kind

HOLDER = 0  # the byte that the holder locks
LONGEST = 4096  # bytes of text in the file
SHOWN = 300  # characters of it in messages
_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def held(
    path: Path, work: str, settle: Callable[[int], None] = lambda descriptor: None, shared: float | None = None
) -> Iterator[str | None]:
    """Hold the lock at `path`, and remove the file afterwards; yield a remark if the file system has no locks.

    Args:
        path: the lock file, in the folder that it locks.
        work: what takes such locks, for messages: "build", "training".
        settle: called with the descriptor once the lock is held; it may raise the OSError of a lock held elsewhere if
            the folder is still in use. For a shared lock, only the first holder calls it.
        shared: share the lock with others, waiting up to this many seconds for it; None: hold it exclusively, or fail
            at once. The last holder removes the file.

    Raises:
        ShardsError: another process holds the lock, or `path` is not a lock file.
        OSError: the file cannot be written.
    """
    descriptor, remark = _take(path, work, settle, shared)
    try:
        _sign(descriptor, path)
        yield remark
    finally:
        if (shared is None or _is_last(descriptor)) and _is(path, descriptor):
            path.unlink(missing_ok=True)  # while still locked, so that no other holder's file is removed
        os.close(descriptor)


def open_lock(path: Path, create: bool) -> int:
    """Open a lock file, creating it if `create`, and return its descriptor.

    Raises:
        ShardsError: the path is not a small regular file without hard links, so it is not ours.
        OSError: the file cannot be opened.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if create else 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise ShardsError(f"{path}: expected a lock file, got {_kind(path)}") from None
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1 and found.st_size <= LONGEST:  # 0 links: just removed
        return descriptor
    os.close(descriptor)
    got = f"one with {found.st_nlink} names and {found.st_size} bytes"
    raise ShardsError(f"{path}: expected a lock file, got {got if stat.S_ISREG(found.st_mode) else _kind(path)}")


def lock_byte(descriptor: int, kind: int, byte: int) -> bool:
    """Lock or unlock (fcntl.LOCK_*) a byte without waiting; return False if the file system has no locks.

    Raises:
        OSError: another process holds the lock.
    """
    try:
        fcntl.lockf(descriptor, kind if kind == fcntl.LOCK_UN else kind | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def holder_of(descriptor: int) -> str:
    """Return who holds the lock, according to its file, which anyone with access may have written."""
    try:
        found = json.loads(os.pread(descriptor, LONGEST, 0))
        return one_line(f"process {int(found['pid'])} on {found['host']}, since {found['since']}")[:SHOWN]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return "one that has just started"


def _take(path: Path, work: str, settle: Callable[[int], None], shared: float | None) -> tuple[int, str | None]:
    """Return a descriptor of the locked file, and a remark if the file system has no locks."""
    while True:
        descriptor, remark = open_lock(path, create=True), None
        try:
            if (kind := _lock(descriptor, shared)) is None:
                remark = f"{path.parent}: this file system has no locks: make sure that no other {work} writes here"
            elif not _is(path, descriptor):  # its holder has just removed it
                os.close(descriptor)
                continue
            if kind != fcntl.LOCK_SH:
                settle(descriptor)
            if shared is not None and kind == fcntl.LOCK_EX:
                lock_byte(descriptor, fcntl.LOCK_SH, HOLDER)
        except OSError as error:
            holder = holder_of(descriptor)
            os.close(descriptor)
            if error.errno not in _TAKEN:
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise ShardsError(f"{path.parent}: expected no other {work} at work there, got {holder}") from None
        return descriptor, remark


def _lock(descriptor: int, shared: float | None) -> int | None:
    """Lock the holder's byte; return how (fcntl.LOCK_EX or LOCK_SH), or None if the file system has no locks.

    The first holder of a shared lock holds it exclusively until it has settled.
    """
    end = time.monotonic() + (shared or 0.0)
    kind = fcntl.LOCK_EX
    while True:
        try:
            return kind if lock_byte(descriptor, kind, HOLDER) else None
        except OSError as error:
            if shared is None or error.errno not in _TAKEN or (kind == fcntl.LOCK_SH and time.monotonic() > end):
                raise
            if kind == fcntl.LOCK_SH:
                time.sleep(0.02)
            kind = fcntl.LOCK_SH


def _is_last(descriptor: int) -> bool:
    """Give up a shared lock; return True if no other process holds it, and lock it exclusively then."""
    try:
        # Two holders that both upgraded would both fail. Unlocked first, the later of them succeeds.
        lock_byte(descriptor, fcntl.LOCK_UN, HOLDER)
        lock_byte(descriptor, fcntl.LOCK_EX, HOLDER)
    except OSError:
        return False
    return True


def _sign(descriptor: int, path: Path) -> None:
    """Write the holder into the lock file."""
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _kind(path: Path) -> str:
    try:
        mode = path.lstat().st_mode
    except OSError:
        return "none"
    return "a link" if stat.S_ISLNK(mode) else describe_kind(mode)


def _is(path: Path, descriptor: int) -> bool:
    """Return whether a path still names an open file."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
