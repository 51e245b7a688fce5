"""Map a function over threads, for work that waits for storage. (`crew` has long-lived threads with a queue.)"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from loader.system.limits import affordable_threads

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    threads: int,
    stop: Callable[[], object] = lambda: None,
) -> Iterator[Result]:
    """Yield a function's results for items, in order, computed by up to `threads` threads.

    After an error, an interrupt or `close`, items not yet started are dropped. If no thread can be started
    (`ulimit -u`, `ulimit -v`), the calling thread does the work; an item may then be computed twice.

    Args:
        function: is called from several threads at once.
        items: its arguments.
        threads: how many threads to use at most.
        stop: called before waiting for items still in progress, to let a long-running function end early.
    """
    if (threads := affordable_threads(threads)) == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads)
    futures: list[Future[Result]] = []
    try:
        try:
            for item in items:
                futures.append(pool.submit(function, item))
        except (RuntimeError, MemoryError):  # "can't start new thread"
            pass
        for future in futures:
            yield future.result()
        for item in items[len(futures) :]:
            yield function(item)
    finally:
        stop()
        pool.shutdown(cancel_futures=True)
