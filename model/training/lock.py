"""The lock of a run's folder: one training at a time."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loader.system.lockfile import held

LOCK = "train.lock"


@contextmanager
def locked(folder: Path) -> Iterator[str | None]:
    """Hold the lock of a run's folder, created if missing; yield a message if the file system has no locks.

    On exit, remove the lock file, and the folder if it is empty and was created here.

    Raises:
        ShardsError: another training holds the lock.
        OSError: the folder or the lock file cannot be written.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]  # innermost first
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with held(folder / LOCK, "training") as message:
            yield message
    finally:
        with suppress(OSError):  # not empty, or removed by another process
            for path in created:
                path.rmdir()
