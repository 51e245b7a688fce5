"""The lock of a folder: a file that one process holds, and that ends with it, over NFS too.

POSIX record locks (fcntl) are the kernel's, or the NFS server's: a dead process holds none, and neither forked children
nor programs that they start inherit one. The file's text tells a person who holds it; it proves nothing.
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
LONGEST = 4096  # bytes of the text in the file
SHOWN = 300  # characters of that which are shown
_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def held(
    path: Path, work: str, settle: Callable[[int], None] = lambda descriptor: None, shared: float | None = None
) -> Iterator[str | None]:
    """Hold the lock at `path`; yield a remark where the file system has no locks. The file is gone afterwards.

    Args:
        path: the lock's file, in the folder that it is of.
        work: what takes such locks, for messages: "build", "training".
        settle: called with the descriptor once the lock is held; an OSError of a lock that is taken means that it is
            not free yet. Of a shared lock, it is called for the first holder alone.
        shared: hold the lock together with others that share it, waiting up to this many seconds for it; None: hold it
            exclusively, or fail at once. The last holder removes the file.

    Raises:
        ShardsError: another process holds it, or something else is at `path`.
        OSError: the file cannot be written.
    """
    descriptor, remark = _take(path, work, settle, shared)
    try:
        _sign(descriptor, path)
        yield remark
    finally:
        if (shared is None or _is_last(descriptor)) and _is(path, descriptor):
            path.unlink(missing_ok=True)  # before the lock is let go: nobody else's file is removed
        os.close(descriptor)


def open_lock(path: Path, create: bool) -> int:
    """Open a lock's file, made if need be, and return its descriptor.

    Raises:
        ShardsError: it is anything but a small file of one name: whose it is, and what it holds, is then not ours.
        OSError: it cannot be opened.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if create else 0)
    try:
        descriptor = os.open(path, flags, 0o666)
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


def lock_byte(descriptor: int, kind: int, byte: int) -> bool:
    """Lock or unlock (fcntl.LOCK_*) a byte at once. Return False where the file system has no locks.

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


def holder_of(descriptor: int) -> str:
    """Return who has the lock, as its file says: the text of anyone who can write there."""
    try:
        found = json.loads(os.pread(descriptor, LONGEST, 0))
        return one_line(f"process {int(found['pid'])} on {found['host']}, since {found['since']}")[:SHOWN]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return "one that has just begun"


def _take(path: Path, work: str, settle: Callable[[int], None], shared: float | None) -> tuple[int, str | None]:
    """A descriptor of the lock's file with the lock on it, or with a remark that there are no locks."""
    while True:
        descriptor, remark = open_lock(path, create=True), None
        try:
            if (kind := _lock(descriptor, shared)) is None:
                remark = f"{path.parent}: this file system has no locks: see to it that no other {work} writes here"
            elif not _is(path, descriptor):  # its holder removed it just now
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
    """Lock the holder's byte; return how (fcntl.LOCK_EX or LOCK_SH), None where the file system has no locks.

    The first holder of a shared lock has it exclusively, until it has settled.
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
    """Write into the lock's file who holds it."""
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
    """Whether a path still names an open file."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
