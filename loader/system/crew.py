"""Long-lived worker threads that a finaliser can stop without waiting for them."""

import threading
from collections.abc import Callable

from loader.errors import ShardsError

_BOOKKEEPING = 1.0  # seconds to wait for `threading` to unregister a finished thread


class Crew:
    """Daemon threads that all run one function; the last one to return runs another.

    Non-daemon threads would keep the interpreter alive as long as anything refers to an iterator. The owner makes
    `work` return through a `queue.SimpleQueue`, whose `put` is reentrant. A finaliser must not do more: the garbage
    collector may run it in any thread, at any point, while any lock is held.

    Args:
        name: name of the threads.
        work: takes jobs from a queue until told to return; must not raise.
        finish: releases what the threads used.
    """

    def __init__(self, name: str, work: Callable[[], None], finish: Callable[[], None]) -> None:
        self._name, self._shift = name, _Shift(work, finish)
        self._threads: list[threading.Thread] = []
        self._growing = threading.Lock()

    def grow(self, count: int) -> None:
        """Start threads until there are `count`, or as many as the system allows.

        Raises:
            ShardsError: not even one thread can be started.
        """
        if len(self._threads) >= count:
            return
        with self._growing:
            while len(self._threads) < count:
                # Threads refer to the shift only, so a crew and its owner can be collected while threads run.
                thread = _Worker(target=self._shift.run, name=self._name, daemon=True)
                self._shift.begin()
                try:
                    thread.start()
                except RuntimeError as error:
                    self._shift.withdraw()
                    if self._threads:
                        return
                    raise ShardsError(f"{self._name}: expected to start a thread, got: {error}") from error
                self._threads.append(thread)

    def wait(self) -> None:
        """Wait until all threads have ended, and raise what `finish` raised. They must have been told to return."""
        if not self._threads:
            self._shift.finish()
        self._shift.ended.wait()
        for thread in self._threads:
            # Its work is done; unregistering it may need a lock that our caller holds, so the wait is limited.
            thread.join(_BOOKKEEPING)
        if error := self._shift.error:
            self._shift.error = None
            raise error


def is_worker() -> bool:
    """Return whether this thread belongs to a crew. A finaliser that runs in one must not wait for other threads.

    The garbage collector runs finalisers in any thread, so waiting could be a deadlock.
    """
    return isinstance(threading.current_thread(), _Worker)


class _Worker(threading.Thread):
    pass


class _Shift:
    """The state shared by the threads of a crew."""

    def __init__(self, work: Callable[[], None], finish: Callable[[], None]) -> None:
        self.ended = threading.Event()
        self.error: BaseException | None = None
        self._work, self._finish = work, finish
        self._running, self._guard = 0, threading.Lock()

    def begin(self) -> None:
        """Count a thread that is about to start."""
        with self._guard:
            self._running += 1

    def withdraw(self) -> bool:
        """Count a thread as ended; return whether it was the last one."""
        with self._guard:
            self._running -= 1
            return self._running == 0

    def run(self) -> None:
        """Run `work`, then `finish` if this was the last thread."""
        try:
            self._work()
        finally:
            if self.withdraw():
                self.finish()

    def finish(self) -> None:
        """Run `finish`, and keep its error for `wait`."""
        try:
            self._finish()
        except BaseException as error:  # `wait` raises it, if it is called at all
            self.error = error
        finally:
            self.ended.set()
