"""Shards built side by side in processes that share a count of images done and a wish to stop."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from ctypes import c_bool, c_long
from typing import Any

from prep.shard import ShardPlan, ShardRecord, build_shard

TICK = 0.2  # seconds between reports


def build_shards(
    plans: Sequence[ShardPlan], workers: int, skip_bad: bool, report: Callable[[int], None]
) -> list[ShardRecord]:
    """Build all shards and return their records in the order of the plans.

    After a bad image (unless `skip_bad`), an error or an interrupt, images in work are finished and no other is
    begun; the records then hold what was bad by then, and an error is raised.

    Args:
        plans: the shards, apart from each other.
        workers: processes; with 1, or a single shard, all happens in this one.
        skip_bad: go on after an image that cannot be used.
        report: is told now and then how many images are done.
    """
    if min(workers, len(plans)) == 1:
        return list(_build_here(plans, skip_bad, report))
    context = multiprocessing.get_context("spawn")  # forking a process with threads (OpenCV's, say) can hang it
    done, stop = context.Value(c_long, 0), context.Value(c_bool, False)
    pool = ProcessPoolExecutor(min(workers, len(plans)), context, _start_worker, (done, stop, skip_bad))
    try:
        futures = [pool.submit(_build_in_worker, plan) for plan in plans]
        waiting: set[Future[ShardRecord]] = set(futures)
        while waiting:
            finished, waiting = wait(waiting, TICK, FIRST_COMPLETED)
            report(done.value)
            stop.value = stop.value or any(future.exception() for future in finished)
        return [future.result() for future in futures]
    finally:
        stop.value = True
        pool.shutdown(cancel_futures=True)


def _build_here(plans: Sequence[ShardPlan], skip_bad: bool, report: Callable[[int], None]) -> Iterator[ShardRecord]:
    done, going = 0, True

    def proceed(good: bool) -> bool:
        nonlocal done, going
        done, going = done + 1, good or skip_bad
        report(done)
        return going

    for plan in plans:
        if going:
            yield build_shard(plan, proceed)


_shared: dict[str, Any] = {}


def _start_worker(done: Any, stop: Any, skip_bad: bool) -> None:
    """Interrupts are for the parent, which then asks the workers to stop; they do not outlive it if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _shared.update(done=done, stop=stop, skip_bad=skip_bad)


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _build_in_worker(plan: ShardPlan) -> ShardRecord:
    if _shared["stop"].value:
        return ShardRecord(None, [], [])

    def proceed(good: bool) -> bool:
        with _shared["done"].get_lock():
            _shared["done"].value += 1
        if not good and not _shared["skip_bad"]:
            _shared["stop"].value = True
        return not _shared["stop"].value

    return build_shard(plan, proceed)
