"""Errors while reading a source: is this one file bad, or does its storage fail?

`--on-error skip` skips bad files. It must never skip files because a mount died: storage errors, and all errors not
listed here, stop the build, which the same command resumes.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loader.errors import ShardsError, one_line
from loader.system.safefile import UnsafeFileError

# Errors of a single path. All others (EIO, ENOTCONN, ESTALE, ETIMEDOUT, EMFILE, ENOMEM, …) are errors of the machine or
# the mount.
FILE_ERRORS = frozenset(
    (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
)
NOT_FOUND = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG))  # a broken link, too


class ImageError(ShardsError):
    """An unusable image file, with the reason, in one line."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class StorageError(ShardsError):
    """Storage that fails while sources are read; the images themselves may be fine."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


@dataclass(frozen=True)
class SourceFolder:
    """The folder in which a source was found, with its identity at that time (st_dev, st_ino)."""

    path: Path
    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "SourceFolder":
        """Return the folder at `path` as it is now; OSError if it cannot be examined."""
        found = path.stat()
        return cls(path, found.st_dev, found.st_ino)

    def is_intact(self) -> bool:
        """Return whether the folder can still be listed and is the same: after an unmount it differs or is empty."""
        try:
            found = self.path.stat()
            with os.scandir(self.path) as entries:
                has_entries = next(entries, None) is not None
        except OSError:
            return False
        # Some network file systems renumber their inodes at any time.
        return found.st_dev == self.device and (found.st_ino == self.inode or has_entries)


def shown(path: Path) -> str:
    """Return a path as text for messages: its bytes decoded as UTF-8, independent of the locale."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def explain(error: OSError, path: Path, folder: SourceFolder | None = None) -> ShardsError:
    """Return the ImageError or StorageError that a system error on the source at `path` amounts to.

    A missing or unreadable file counts as a bad image only while `folder`, in which it was found, is intact.
    """
    reason = error.strerror or str(error)
    file_error = error.errno in FILE_ERRORS or isinstance(error, UnsafeFileError)
    if file_error and (folder is None or folder.is_intact()):
        return ImageError(f"{shown(path)}: expected a readable file, got {reason}")
    if file_error and folder is not None:
        reason += f", and the folder {shown(folder.path)} is gone or has been replaced"
    return StorageError(
        f"{shown(path)}: expected working storage, got {reason}; images are not skipped for that "
        "(if only this file fails, move it away)"
    )


@contextmanager
def reading(path: Path, folder: SourceFolder | None = None) -> Iterator[None]:
    """Turn system errors while reading a source into ImageError or StorageError; see `explain`."""
    try:
        yield
    except OSError as error:
        raise explain(error, path, folder) from None
