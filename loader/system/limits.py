"""What the shell's limits (`ulimit`) leave to this process."""

import resource
import threading
from pathlib import Path

PER_THREAD = 160 << 20  # bytes of address space: a stack, and a heap of malloc's


def address_space() -> int | None:
    """Return the bytes of address space that this process may still map (`ulimit -v`); None if there is no limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    except OSError:
        return None
    return max(limit - pages * resource.getpagesize(), 0)


def affordable_threads(threads: int) -> int:
    """Return how many of so many threads there is address space for.

    Beyond that, threads may not start, or die before they tell that they have started, and are waited for forever.
    """
    space = address_space()
    return threads if space is None else min(threads, space // (2 * PER_THREAD))


def startable_threads(wanted: int) -> int:
    """Return how many threads the system lets this process have at once, up to `wanted`.

    Found out by trying, but for `ulimit -v`: a thread that dies for want of memory may be waited for without end.
    """
    wanted = affordable_threads(wanted)
    release = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(wanted):
            thread = threading.Thread(target=release.wait)
            thread.start()
            started.append(thread)
    except (RuntimeError, MemoryError):  # "can't start new thread"
        pass
    finally:
        release.set()
        for thread in started:
            thread.join()
    return len(started)
