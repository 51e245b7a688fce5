"""One training at a time in a folder."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loader.system.lockfile import held

LOCK = "train.lock"


@contextmanager
def locked(folder: Path) -> Iterator[str | None]:
    """Hold the lock of a run's folder, which is made if need be; yield a remark where there are no locks.

    Afterwards the lock's file is gone, and so is the folder if nothing was written there.

    Raises:
        ShardsError: another training holds it.
        OSError: the folder or the lock's file cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]  # the innermost first
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with held(folder / LOCK, "training") as remark:
            yield remark
    finally:
        with suppress(OSError):  # not empty, or another process is faster
            for path in made:
                path.rmdir()
