"""Descriptors of shards: as many are kept as the process can spare, whatever the number of shards.

All datasets of a process share one table. A shard that is to be read and is not open takes the place of the one that
was read longest ago; a shard that is being read keeps its descriptor.
"""

import errno
import itertools
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from weakref import WeakSet

MOST = 1024  # descriptors worth keeping, wherever the limit is
FEWEST = 4
RESERVE = 16  # descriptors left to the rest of the process
CROWDED = (errno.EMFILE, errno.ENFILE)
_clock = itertools.count()


class OpenFile:
    """A descriptor that is closed when it is dropped."""

    def __init__(self, descriptor: int, name: str) -> None:
        self.descriptor, self.name = descriptor, name
        self.users, self.used = 0, 0  # reads under way; when the last one began

    def close(self, close: Callable[[int], None] = os.close) -> None:
        """Close it, once; OSError naming the file if that fails."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor < 0:
            return
        try:
            close(descriptor)
        except OSError as error:  # closed nevertheless: Linux never leaves a descriptor open
            raise OSError(error.errno, error.strerror, self.name) from None

    def __del__(self) -> None:
        # No lock, and nothing to wait for: this runs wherever the garbage collector does.
        with suppress(OSError):
            self.close()


class Table:
    """The open files of a process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._files: WeakSet[OpenFile] = WeakSet()  # their datasets hold them
        self._opening = 0
        self._most: int | None = None
        self._raised = False

    @contextmanager
    def use(self, cache: dict[int, OpenFile], key: int, name: str, open_file: Callable[[], int]) -> Iterator[int]:
        """Give the descriptor of a file for the time of a read.

        Args:
            cache: where the files of a dataset are kept.
            key: of the file in the cache.
            name: of the file, for messages.
            open_file: opens it, where it is not open; it needs two descriptors for that time.
        """
        file = self._found(cache, key) or self._opened(cache, key, name, open_file)
        try:
            yield file.descriptor
        finally:
            with self._changed:
                file.users -= 1
                self._changed.notify_all()

    def relieve(self) -> bool:
        """Make it likelier that a file can be opened, after an attempt that failed; False if all was tried."""
        with self._changed:
            if self._raise_limit():
                return True
            closed = [self._close_one() for _ in range(len(self._files))]
            return any(closed)

    def forget(self) -> None:
        """In a process that was forked: close what was inherited, and forget who used it."""
        inherited = self._open()
        self.__init__()  # type: ignore[misc]  # a lock may be held by a thread that was not forked
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
                self._changed.wait(0.1)  # files of datasets that are dropped leave without a word
            self._opening += 1
        file = OpenFile(-1, name)
        try:
            file.descriptor = open_file()  # others may read meanwhile
        finally:
            with self._changed:
                self._opening -= 1
                if file.descriptor >= 0:
                    self._files.add(file)
                    file.users, file.used = 1, next(_clock)
                    # Another thread may have opened it as well. Then that one stays, and this one goes after its use.
                    kept = cache.get(key)
                    if kept is None or kept.descriptor < 0:
                        cache[key] = file
                self._changed.notify_all()
        return file

    def _open(self) -> list[OpenFile]:
        while True:
            # A thread that drops a dataset takes no lock, and may shrink the set while it is copied: WeakSet guards
            # against that only within one thread.
            with suppress(RuntimeError):
                return list(self._files)

    def _has_room(self) -> bool:
        """Whether a file more may be opened, with others closed for it where need be."""
        if self._most is None:
            self._most = _spare()
        if self._needed() > self._most:
            self._raise_limit()
        while self._needed() > self._most:
            if not self._close_one():
                # At least one file can be read at a time, however low the limit.
                return not self._opening and not any(file.users for file in self._open())
        return True

    def _needed(self) -> int:
        """Descriptors in use, once a file more has been opened; opening one takes two."""
        return sum(file.descriptor >= 0 for file in self._open()) + 2 * (self._opening + 1)

    def _close_one(self) -> bool:
        idle = [file for file in self._open() if file.descriptor >= 0 and not file.users]
        if not idle:
            return False
        with suppress(OSError):
            min(idle, key=lambda file: file.used).close()
        return True

    def _raise_limit(self) -> bool:
        """Raise the soft limit of this process to the hard one, the first time that it is in the way."""
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
    """How many descriptors this process may have now."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _spare() -> int:
    """Descriptors that nobody else needs."""
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
