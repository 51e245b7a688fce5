"""Threads that wait for storage, as many as the system gives."""

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
    """Yield the results, in order, of a function that waits for storage. An error or interrupt leaves the rest.

    Where no thread can be started (`ulimit -u`, `ulimit -v`) this one does the work; an item may then be done twice.

    `stop` is called before waiting for the items still in progress, so that a long-running function can end early.
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
