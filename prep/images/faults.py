"""What an error met while reading a source means: this one file is bad, or the storage it lies on fails.

`--on-error skip` leaves out bad files. It must never leave out files because a mount died: errors of the storage, and
all that are not known, end the build, which the same command resumes.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loader.errors import ShardsError, one_line
from loader.system.safefile import UnsafeFileError

# Errors that say something about one path. All others (EIO, ENOTCONN, ESTALE, ETIMEDOUT, EMFILE, ENOMEM, …) say
# something about the machine or the mount.
OF_ONE_FILE = frozenset(
    (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
)
NOWHERE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG))  # where a link may lead


class ImageError(ShardsError):
    """An image file that cannot be used, and why, in one line."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class StorageError(ShardsError):
    """Storage that fails while sources are read; it says nothing about the images there."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


@dataclass(frozen=True)
class Place:
    """The folder in which a source was found, and which folder that was (st_dev, st_ino)."""

    path: Path
    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "Place":
        """Return the place that a folder is now; OSError if it cannot be looked at."""
        found = path.stat()
        return cls(path, found.st_dev, found.st_ino)

    def stands(self) -> bool:
        """Return whether the folder can still be listed and is the same: an unmounted one is another, or empty."""
        try:
            found = self.path.stat()
            with os.scandir(self.path) as entries:
                filled = next(entries, None) is not None
        except OSError:
            return False
        # Some network file systems number their inodes anew at any time.
        return found.st_dev == self.device and (found.st_ino == self.inode or filled)


def shown(path: Path) -> str:
    """Return a path as text for messages: its bytes read as UTF-8, whatever the locale says of names."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def explain(error: OSError, path: Path, place: Place | None = None) -> ShardsError:
    """Return what an error of the system means for the source at `path`: ImageError or StorageError.

    A file that is missing or forbidden is a bad one only as long as the folder it was found in, `place`, still stands.
    """
    reason = error.strerror or str(error)
    of_one_file = error.errno in OF_ONE_FILE or isinstance(error, UnsafeFileError)
    if of_one_file and (place is None or place.stands()):
        return ImageError(f"{shown(path)}: expected a readable file, got {reason}")
    if of_one_file and place is not None:
        reason += f", and the folder {shown(place.path)} is gone or another one"
    return StorageError(
        f"{shown(path)}: expected storage that works, got {reason}; no image is left out for that "
        "(if it is this file alone that fails, move it away)"
    )


@contextmanager
def reading(path: Path, place: Place | None = None) -> Iterator[None]:
    """Raise errors of the system met while reading a source as what they mean; see `explain`."""
    try:
        yield
    except OSError as error:
        raise explain(error, path, place) from None
