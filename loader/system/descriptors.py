"""A cache of open shards, so that a dataset can have more shards than the process may have descriptors.

All datasets of a process share one table. Opening a shard closes the least recently used one if necessary; shards being
read stay open.
"""

import errno
import itertools
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from weakref import WeakSet

MOST = 1024  # more open shards gain nothing
FEWEST = 4
RESERVE = 16  # descriptors left to the rest of the process
CROWDED = (errno.EMFILE, errno.ENFILE)
_clock = itertools.count()


class OpenFile:
    """A descriptor that is closed when the object is collected."""

    def __init__(self, descriptor: int, name: str) -> None:
        self.descriptor, self.name = descriptor, name
        self.users, self.used = 0, 0  # reads in progress; when the last one began

    def close(self, close: Callable[[int], None] = os.close) -> None:
        """Close the descriptor, once; raise OSError naming the file if that fails."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor < 0:
            return
        try:
            close(descriptor)
        except OSError as error:  # Linux closes the descriptor even if close fails
            raise OSError(error.errno, error.strerror, self.name) from None

    def __del__(self) -> None:
        # Takes no lock and waits for nothing: the garbage collector may run this anywhere.
        with suppress(OSError):
            self.close()


class Table:
    """The open files of a process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._files: WeakSet[OpenFile] = WeakSet()  # owned by the datasets' caches
        self._opening = 0
        self._most: int | None = None
        self._raised = False

    @contextmanager
    def use(self, cache: dict[int, OpenFile], key: int, name: str, open_file: Callable[[], int]) -> Iterator[int]:
        """Yield the descriptor of a file for one read.

        Args:
            cache: the open files of a dataset.
            key: the file's key in the cache.
            name: the file's name, for messages.
            open_file: opens the file; may use two descriptors while it runs.
        """
        file = self._found(cache, key) or self._opened(cache, key, name, open_file)
        try:
            yield file.descriptor
        finally:
            with self._changed:
                file.users -= 1
                self._changed.notify_all()

    def make_room(self) -> bool:
        """Free descriptors after a file could not be opened; return False if there are none left to free."""
        with self._changed:
            if self._raise_limit():
                return True
            closed = [self._close_one() for _ in range(len(self._files))]
            return any(closed)

    def forget(self) -> None:
        """Close inherited files and reset the table, in a forked child."""
        inherited = self._open()
        self.__init__()  # type: ignore[misc]  # the lock may be held by a thread that does not exist here
        for file in inherited:
            with suppress(OSError):
                file.close()

    def _found(self, cache: dict[int, OpenFile], key: int) -> OpenFile | None:
        with self._changed:
            file = cache.get(key)
            if file is None or file.descriptor < 0:
                return None
            file.users, file.used = file.users + 1, next(_clock)
            return file

    def _opened(self, cache: dict[int, OpenFile], key: int, name: str, open_file: Callable[[], int]) -> OpenFile:
        with self._changed:
            while not self._has_room():
                self._changed.wait(0.1)  # files of collected datasets are closed without a notification
            self._opening += 1
        file = OpenFile(-1, name)
        try:
            file.descriptor = open_file()  # without the lock: other threads go on reading
        finally:
            with self._changed:
                self._opening -= 1
                if file.descriptor >= 0:
                    self._files.add(file)
                    file.users, file.used = 1, next(_clock)
                    # If another thread opened the file as well, keep that one, and close this one after its read.
                    kept = cache.get(key)
                    if kept is None or kept.descriptor < 0:
                        cache[key] = file
                self._changed.notify_all()
        return file

    def _open(self) -> list[OpenFile]:
        while True:
            # A dataset collected in another thread may shrink the set while it is copied; WeakSet guards against that
            # within one thread only.
            with suppress(RuntimeError):
                return list(self._files)

    def _has_room(self) -> bool:
        """Return whether one more file may be opened, closing idle ones if necessary."""
        if self._most is None:
            self._most = _spare()
        if self._needed() > self._most:
            self._raise_limit()
        while self._needed() > self._most:
            if not self._close_one():
                # However low the limit, one file can always be open.
                return not self._opening and not any(file.users for file in self._open())
        return True

    def _needed(self) -> int:
        """Return the descriptors in use if one more file is opened; opening takes two."""
        return sum(file.descriptor >= 0 for file in self._open()) + 2 * (self._opening + 1)

    def _close_one(self) -> bool:
        idle = [file for file in self._open() if file.descriptor >= 0 and not file.users]
        if not idle:
            return False
        with suppress(OSError):
            min(idle, key=lambda file: file.used).close()
        return True

    def _raise_limit(self) -> bool:
        """Raise the soft limit to the hard one, once, when it is first reached."""
        if self._raised:
            return False
        self._raised = True
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == hard or (self._most or 0) >= MOST:
            return False
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            self._most = _spare() + len(self._files)
            return True
        return False


def limit() -> int:
    """Return how many descriptors this process may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _spare() -> int:
    """Return how many descriptors this process does not need for anything else."""
    soft = limit()
    if soft == resource.RLIM_INFINITY:
        return MOST
    try:
        taken = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  a Path for each would cost more than the list
    except OSError:
        taken = RESERVE
    return max(FEWEST, min(MOST, soft - taken - RESERVE))


table = Table()
os.register_at_fork(after_in_child=table.forget)
