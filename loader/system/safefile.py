"""Safe access to files in shared folders, where someone else may have planted links, pipes or huge files.

There are two kinds of paths. A *member* is a name that we choose inside a folder, which may be shared: an index, a
shard, a record, a lock. It must be a regular file, and not a link out of that folder. A *named* path comes from the
user; links are followed, but must lead to a regular file. No function blocks on a pipe or reads more bytes than its
caller allows.
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
    """Open a member for reading and return its descriptor. Links are followed only within the folder.

    Raises:
        UnsafeFileError: the path is a link out of its folder, or not a regular file.
        OSError: the file cannot be opened.
    """
    try:
        return _regular(os.open(path, _READ | os.O_NOFOLLOW), path)
    except OSError as error:
        if error.errno != errno.ELOOP or isinstance(error, UnsafeFileError):
            raise
    # Unlike realpath, Path.resolve raises RuntimeError for a link to itself.
    target = Path(os.path.realpath(path))
    if target.parent != Path(os.path.realpath(path.parent)):
        raise UnsafeFileError(errno.ELOOP, f"a link to {path.readlink()}", path)
    return _regular(os.open(target, _READ | os.O_NOFOLLOW), path)


def open_named(path: Path) -> int:
    """Open a file named by the user for reading, following links, and return its descriptor.

    Raises:
        UnsafeFileError: the path does not lead to a regular file.
        OSError: the file cannot be opened.
    """
    return _regular(os.open(path, _READ), path)


def open_own(path: Path) -> int:
    """Open a member that only this user can have created for reading, and return its descriptor.

    Raises:
        UnsafeFileError: the path is a link, is not a regular file, has hard links, or belongs to another user.
        OSError: the file cannot be opened.
    """
    descriptor = _regular(os.open(path, _READ | os.O_NOFOLLOW), path)
    found = os.fstat(descriptor)
    if found.st_nlink == 1 and is_own(found, path.parent):
        return descriptor
    os.close(descriptor)
    what = f"a file with {found.st_nlink} names" if found.st_nlink != 1 else f"a file of user {found.st_uid}"
    raise UnsafeFileError(errno.EPERM, what, path)


def is_own(found: os.stat_result, folder: Path) -> bool:
    """Return whether a file or folder found in `folder` has the owner that files created by this process get there.

    That is usually this user, but servers may map users (root_squash, CIFS with `uid=`): a temporary file shows how.
    """
    return found.st_uid == os.geteuid() or found.st_uid == _owner_of_new_files(folder)


def open_exclusive(path: Path, mode: int = 0o666) -> int:
    """Create a file for reading and writing, and return its descriptor.

    Raises:
        FileExistsError: something exists at `path`, even a dangling link; it is not touched.
        OSError: the file cannot be created.
    """
    return os.open(path, _NEW, mode)


def open_to_write(path: Path, flags: int = os.O_WRONLY | os.O_APPEND) -> int:
    """Open a member for writing, creating it if necessary, and return its descriptor. Links are not followed.

    Args:
        path: the member.
        flags: how to open it; by default, to append.

    Raises:
        UnsafeFileError: the path is a link, is not a regular file, or has hard links, which may lie elsewhere.
        OSError: the file cannot be opened.
    """
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UnsafeFileError(errno.ELOOP, "a link, which is not written through", path) from None
    if os.fstat(_regular(descriptor, path)).st_nlink > 1:
        os.close(descriptor)
        raise UnsafeFileError(errno.EMLINK, "a file with several names, which is not written to", path)
    return descriptor


def read_member(path: Path, limit: int) -> bytes:
    """Return the content of a member (`open_member`); raise UnsafeFileError (EFBIG) beyond `limit` bytes."""
    return _read(open_member(path), path, limit)


def read_named(path: Path, limit: int) -> bytes:
    """Return the content of a file named by the user (`open_named`); raise UnsafeFileError (EFBIG) beyond `limit`."""
    return _read(open_named(path), path, limit)


def read_own(path: Path, limit: int) -> bytes:
    """Return the content of a file created by this user (`open_own`); raise UnsafeFileError (EFBIG) beyond `limit`."""
    return _read(open_own(path), path, limit)


def write_staged(path: Path, data: bytes) -> None:
    """Write `data` to a new file and sync it to disk. Whatever was at `path`, even a link, is removed first.

    Raises:
        OSError: the file cannot be written; `path` does not exist then.
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
    """Replace the file at `path` by rename: readers see all of the old or all of the new content, even after a crash.

    Raises:
        OSError: the error, naming `path`, which is unchanged; no temporary file is left.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")  # short, even if the name is as long as allowed
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
    """Sync the entries of a folder to disk, if the file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def describe_kind(mode: int) -> str:
    """Return the kind of file that a mode (`st_mode`) of no regular file stands for: "a pipe", "a folder", …"""
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
    raise UnsafeFileError(errno.EINVAL, f"{describe_kind(mode)}, not a regular file", path)


def _read(descriptor: int, path: Path, limit: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UnsafeFileError(errno.EFBIG, f"more than {limit} bytes", path)
    return data
