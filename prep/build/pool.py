"""Shards built side by side in processes, each told by a pipe what to build next, and telling what became of it."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from loader.errors import ShardsError
from loader.system.safepath import safe_path
from prep.build.lock import share_lock
from prep.images.decoders import configure_decoders
from prep.shard.shard import ShardPlan, ShardRecord, build_shard

Finished = Callable[[ShardPlan, ShardRecord], None]
REMEDY = "fewer --workers need less (ulimit -a shows the limits)"
SHORT = "memory is short: try fewer --workers"
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


def build_shards(
    plans: Sequence[ShardPlan],
    workers: int,
    skip_bad: bool,
    report: Callable[[int], None],
    finished: Finished,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Build all shards, in a folder that is locked.

    After a bad image (unless `skip_bad`) images in work are finished and no other is begun. An error or an interrupt
    ends all at once: what is in work is lost then.

    Args:
        plans: the shards, apart from each other.
        workers: processes; with 1, or a single shard, all happens in this one.
        skip_bad: go on after an image that cannot be used.
        report: is told how many images are done.
        finished: is given each plan and what became of it, here, in the order in which they end; of those that were
            stopped, too.
        note: is told if fewer processes could be started.

    Raises:
        OSError: a shard cannot be written.
        StorageError: the storage of the sources fails.
        ShardsError: a process was killed, or none could be started.
        MemoryError: memory is short.
    """
    if min(workers, len(plans)) > 1:
        with _started(min(workers, len(plans)), plans[0].folder, skip_bad, note) as processes:
            _feed(processes, plans, skip_bad, report, finished)
        return
    done, going = 0, True

    def proceed(good: bool) -> bool:
        nonlocal done, going
        done, going = done + 1, good or skip_bad
        report(done)
        return going

    for plan in plans:
        if going:
            finished(plan, build_shard(plan, proceed))


@contextlib.contextmanager
def _started(
    count: int, folder: Path, skip_bad: bool, note: Callable[[str], None]
) -> Iterator[dict[Connection, BaseProcess]]:
    """Worker processes by the pipe to each; none is left afterwards."""
    context = multiprocessing.get_context("spawn")  # forking a process with threads (OpenCV's, say) can hang it
    processes: dict[Connection, BaseProcess] = {}
    # Interrupts are for the parent: workers inherit that they are held back, from their first moment on. (What starts
    # with the first process lets them through again: it is started before.)
    with _plain_limits(count, 0), safe_path():
        resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        for number in range(count):
            try:
                with _plain_limits(count, number):
                    pipe, process = _start(context, folder, skip_bad)
            except ShardsError as error:
                if not processes:
                    raise
                note(str(error))
                break
            processes[pipe] = process
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield processes
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)  # a second interrupt leaves no worker behind either
        for pipe, worker in processes.items():
            worker.kill()  # what it holds is a part of a shard, of no use
            worker.join()
            pipe.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(context: SpawnContext, folder: Path, skip_bad: bool) -> tuple[Connection, BaseProcess]:
    here, there = context.Pipe()
    try:
        process = context.Process(target=_work, args=(there, folder, skip_bad), daemon=True)
        with safe_path():
            process.start()
    except BaseException:
        here.close()
        raise
    finally:
        there.close()
    return here, process


@contextlib.contextmanager
def _plain_limits(count: int, started: int) -> Iterator[None]:
    """What the system refuses when a process is started says nothing about the dataset's folder."""
    try:
        yield
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or "too little memory"
        raise ShardsError(f"expected {count} worker processes, got {started}: {reason}; {REMEDY}") from None


def _feed(
    processes: dict[Connection, BaseProcess],
    plans: Sequence[ShardPlan],
    skip_bad: bool,
    report: Callable[[int], None],
    finished: Finished,
) -> None:
    waiting = list(reversed(plans))
    working: dict[Connection, ShardPlan] = {}
    done = 0
    for pipe in processes:
        working[pipe] = waiting.pop()
        _tell(pipe, working[pipe])
    while working:
        for pipe in [pipe for pipe in wait(list(working)) if isinstance(pipe, Connection)]:
            message = _hear(pipe, processes[pipe], working[pipe])
            if message is None:
                done += 1
                report(done)
                continue
            finished(working.pop(pipe), message)
            if message.bad and not skip_bad:
                waiting.clear()
                for other in working:
                    _tell(other, None)
            if waiting:
                working[pipe] = waiting.pop()
                _tell(pipe, working[pipe])


def _tell(pipe: Connection, plan: ShardPlan | None) -> None:
    """Have a worker build a shard; or stop after the image in work."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it was killed: heard of next
        pipe.send(plan)


def _hear(pipe: Connection, process: BaseProcess, plan: ShardPlan) -> ShardRecord | None:
    """What a worker tells: its shard's record; or None, for one image more."""
    try:
        message = pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        raise ShardsError(
            f"{plan.part}: expected the process that builds it to end well, got exit code {process.exitcode}"
            f"{'; perhaps memory was short: try fewer --workers' * killed}"
        ) from None
    if isinstance(message, Exception):
        raise message
    assert message is None or isinstance(message, ShardRecord)
    return message


def _work(pipe: Connection, folder: Path, skip_bad: bool) -> None:
    """Build what the pipe asks for, until it closes."""
    try:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        share_lock(folder)  # from here on no other build begins before this process has ended
    except RuntimeError as error:
        with contextlib.suppress(OSError):
            pipe.send(
                ShardsError(f"{error} in a worker process; fewer --workers need less (ulimit -a shows the limits)")
            )
        return
    except OSError:
        return
    configure_decoders()
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        return

    def proceed(good: bool) -> bool:
        pipe.send(None)
        return (good or skip_bad) and not pipe.poll()

    with contextlib.suppress(EOFError):
        while plan := pipe.recv():
            try:
                message: ShardRecord | Exception = build_shard(plan, proceed)
            except MemoryError:
                message = MemoryError(SHORT)
            except Exception as error:
                message = error
            pipe.send(message)


def _end_with_parent() -> None:
    """A worker does not outlive its parent, however that ends."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
