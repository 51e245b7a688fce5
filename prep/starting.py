"""How many threads there can be: under `ulimit -v` or `-u` fewer than there are cores."""

import threading

from prep.limits import affordable_threads


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
