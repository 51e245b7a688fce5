"""Resource limits of this process (`ulimit`)."""

import resource
import threading
from pathlib import Path

PER_THREAD = 160 << 20  # bytes of address space: a stack, and a malloc arena


def address_space() -> int | None:
    """Return how many bytes this process may still map (`ulimit -v`), or None without a limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    except OSError:
        return None
    return max(limit - pages * resource.getpagesize(), 0)


def affordable_threads(threads: int) -> int:
    """Return how many threads there is address space for, up to `threads`.

    A thread beyond that may die before it signals that it has started, and its creator then waits forever.
    """
    space = address_space()
    return threads if space is None else min(threads, space // (2 * PER_THREAD))


def startable_threads(wanted: int) -> int:
    """Return how many threads this process can start, up to `wanted`, by starting them.

    The limit of address space is computed beforehand: see `affordable_threads`.
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
