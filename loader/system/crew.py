"""Threads that serve until they are told to end, and never need to be waited for."""

import threading
from collections.abc import Callable

from loader.errors import ShardsError

_BOOKKEEPING = 1.0  # seconds at most for `threading` to forget a thread whose work is done


class Crew:
    """Daemon threads that all run one function; the last of them to return runs another one.

    Daemon threads: others would keep the interpreter from ending while something still refers to an iterator.
    Whatever owns a crew tells `work` to return by a `queue.SimpleQueue`, whose `put` is reentrant. That is all that a
    finaliser may do: the garbage collector runs it in any thread, in the midst of anything, under any lock.

    Args:
        name: of the threads.
        work: takes what there is to do from a queue; raises nothing.
        finish: lets go of what the threads used.
    """

    def __init__(self, name: str, work: Callable[[], None], finish: Callable[[], None]) -> None:
        self._name, self._shift = name, _Shift(work, finish)
        self._threads: list[threading.Thread] = []
        self._growing = threading.Lock()

    def grow(self, count: int) -> None:
        """Have that many threads, or as many of them as the system allows.

        Raises:
            ShardsError: it does not allow a single one.
        """
        if len(self._threads) >= count:
            return
        with self._growing:
            while len(self._threads) < count:
                # The thread knows the shift alone: a crew, and its owner, can go while threads are at work.
                thread = _Worker(target=self._shift.run, name=self._name, daemon=True)
                self._shift.begin()
                try:
                    thread.start()
                except RuntimeError as error:
                    self._shift.withdraw()
                    if self._threads:
                        return
                    raise ShardsError(f"{self._name}: expected a thread of its own, got: {error}") from error
                self._threads.append(thread)

    def wait(self) -> None:
        """Wait until all threads have ended, and raise what `finish` raised. They must have been told to end."""
        if not self._threads:
            self._shift.finish()
        self._shift.ended.wait()
        for thread in self._threads:
            # It has ended but for its entry in a table of `threading`, under a lock that our caller may hold.
            thread.join(_BOOKKEEPING)
        if error := self._shift.error:
            self._shift.error = None
            raise error


def is_worker() -> bool:
    """Whether this thread is one of a crew. It then runs a stranger's finaliser, perhaps, and must not wait for others.

    (The garbage collector runs such in any thread: in one, say, for which another one waits that is to be waited for.)
    """
    return isinstance(threading.current_thread(), _Worker)


class _Worker(threading.Thread):
    pass


class _Shift:
    """What the threads of a crew have in common."""

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
        """Count a thread out; whether it was the last one."""
        with self._guard:
            self._running -= 1
            return self._running == 0

    def run(self) -> None:
        """What each thread does."""
        try:
            self._work()
        finally:
            if self.withdraw():
                self.finish()

    def finish(self) -> None:
        """Let go of what was used."""
        try:
            self._finish()
        except BaseException as error:  # for who waits; nobody may
            self.error = error
        finally:
            self.ended.set()
