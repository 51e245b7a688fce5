"""Open, read and write files that a stranger may have prepared; the one place of the project that does.

Two kinds of paths are told apart. A *member* is a name that we form ourselves inside a folder that may be shared: an
index, a shard, a record, a lock. It is never a link out of that folder, nor a pipe or a device. A *named* path comes
from the user, who may point it at a link; what it leads to must still be a regular file. No function waits for the
other end of a pipe, and none reads more bytes than its caller allows.
"""

import errno
import functools
import os
import secrets
import stat
from pathlib import Path

from loader.errors import ShardsError, one_line

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


class UnsafeFileError(OSError, ShardsError):
    """A path that leads to something other than the expected file; `strerror` says to what."""

    def __init__(self, code: int, got: str, path: Path | str) -> None:
        OSError.__init__(self, code, got, str(path))

    def __str__(self) -> str:
        return one_line(f"{self.filename}: {self.strerror}")


def open_member(path: Path) -> int:
    """Open a file of ours for reading and return its descriptor.

    A link is followed only to a regular file of the same folder.

    Raises:
        UnsafeFileError: the path is a link out of its folder, or no regular file.
        OSError: it cannot be opened.
    """
    try:
        return _regular(os.open(path, _READ | os.O_NOFOLLOW), path)
    except OSError as error:
        if error.errno != errno.ELOOP or isinstance(error, UnsafeFileError):
            raise
    # Path.resolve raises RuntimeError for a link that leads to itself.
    target = Path(os.path.realpath(path))
    if target.parent != Path(os.path.realpath(path.parent)):
        raise UnsafeFileError(errno.ELOOP, f"a link to {path.readlink()}", path)
    return _regular(os.open(target, _READ | os.O_NOFOLLOW), path)


def open_named(path: Path) -> int:
    """Open a file that the user named for reading, links followed, and return its descriptor.

    Raises:
        UnsafeFileError: it is no regular file.
        OSError: it cannot be opened.
    """
    return _regular(os.open(path, _READ), path)


def open_own(path: Path) -> int:
    """Open for reading a file that nobody but this user can have made, and return its descriptor.

    Raises:
        UnsafeFileError: it is a link, no regular file, has a second name, or belongs to another user.
        OSError: it cannot be opened.
    """
    descriptor = _regular(os.open(path, _READ | os.O_NOFOLLOW), path)
    found = os.fstat(descriptor)
    if found.st_nlink == 1 and is_own(found, path.parent):
        return descriptor
    os.close(descriptor)
    what = f"a file of {found.st_nlink} names" if found.st_nlink != 1 else f"a file of user {found.st_uid}"
    raise UnsafeFileError(errno.EPERM, what, path)


def is_own(found: os.stat_result, folder: Path) -> bool:
    """Whether a file or folder, found in `folder`, belongs to whoever owns the files that this process makes there.

    That is this user, or nobody in particular: where a server maps users to others (root_squash, CIFS with `uid=`), a
    new file tells.
    """
    return found.st_uid == os.geteuid() or found.st_uid == _owner_of_new_files(folder)


def open_exclusive(path: Path, mode: int = 0o666) -> int:
    """Create a file for reading and writing, and return its descriptor; whatever is at `path` is left alone.

    Raises:
        FileExistsError: something is there already, be it a link that leads nowhere.
        OSError: it cannot be created.
    """
    return os.open(path, _NEW, mode)


def open_to_write(path: Path, flags: int = os.O_WRONLY | os.O_APPEND) -> int:
    """Open a file of ours for writing, made if it is not there, and return its descriptor; no link is followed.

    `flags` say how to write: by default after what is there.

    Raises:
        UnsafeFileError: the path is a link, no regular file, or another name of a file that may be elsewhere.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UnsafeFileError(errno.ELOOP, "a link, where a file is written", path) from None
    if os.fstat(_regular(descriptor, path)).st_nlink > 1:
        os.close(descriptor)
        raise UnsafeFileError(errno.EMLINK, "a file of several names, where one is written", path)
    return descriptor


def read_member(path: Path, limit: int) -> bytes:
    """Return the content of a file of ours; see `open_member`. OSError (EFBIG) if it has more than `limit` bytes."""
    return _read(open_member(path), path, limit)


def read_named(path: Path, limit: int) -> bytes:
    """Return the content of a file that the user named; see `open_named`. OSError (EFBIG) beyond `limit` bytes."""
    return _read(open_named(path), path, limit)


def read_own(path: Path, limit: int) -> bytes:
    """Return the content of a file that only this user can have made; see `open_own`. OSError beyond `limit` bytes."""
    return _read(open_own(path), path, limit)


def write_staged(path: Path, data: bytes) -> None:
    """Write `data` to a new file and have it on the disk. What was at `path`, a link too, is removed first.

    Raises:
        OSError: it cannot be written; nothing of ours is left at `path` then.
    """
    path.unlink(missing_ok=True)
    with os.fdopen(open_exclusive(path), "wb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file at `path` with `data`: a reader, now or after a crash, sees all of the old or all of the new.

    Raises:
        OSError: naming `path`; it is as it was then, and nothing is left beside it.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")  # short, however long the name is
    try:
        write_staged(temporary, data)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def describe_kind(mode: int) -> str:
    """Name what a file mode (`st_mode`) stands for, where it is no regular file: "a pipe", "a folder", …"""
    return _KINDS.get(stat.S_IFMT(mode), "a device")


@functools.lru_cache(64)
def _owner_of_new_files(folder: Path) -> int:
    path = folder / f".{secrets.token_hex(8)}.part"
    try:
        descriptor = open_exclusive(path)
    except OSError:
        return os.geteuid()
    try:
        return os.fstat(descriptor).st_uid
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def _regular(descriptor: int, path: Path) -> int:
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    raise UnsafeFileError(errno.EINVAL, f"{describe_kind(mode)}, no regular file", path)


def _read(descriptor: int, path: Path, limit: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UnsafeFileError(errno.EFBIG, f"more than {limit} bytes", path)
    return data
