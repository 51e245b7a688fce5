"""Building shards in parallel: worker processes, each with a pipe for the shards it is to build and their records."""

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

from loader.errors import ShardsError
from loader.system.safepath import safe_path
from prep.images.decoders import configure_decoders
from prep.plan.dataset import DatasetPlan, ShardPlan
from prep.plan.recipe import Recipe
from prep.shard.records import ShardRecord
from prep.shard.shard import build_shard
from prep.workspace.workspace import Workspace

Finished = Callable[[ShardPlan, ShardRecord], None]
REMEDY = "fewer --workers need less (ulimit -a shows the limits)"
SHORT = "memory is short: try fewer --workers"
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


def build_shards(
    plan: DatasetPlan,
    shards: Sequence[ShardPlan],
    workers: int,
    skip_bad: bool,
    report: Callable[[int], None],
    finished: Finished,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Build shards of a dataset whose folder is locked.

    After an image that cannot be used (unless `skip_bad`), workers finish the images in progress and start no other. An
    error or an interrupt stops everything at once, and loses the shards in progress.

    Args:
        plan: the dataset.
        shards: the shards to build.
        workers: processes; one worker, or one shard, is built in this process.
        skip_bad: continue after an image that cannot be used.
        report: called with the number of images done.
        finished: called in this process with each shard and its record, in the order in which they end, including
            shards that were stopped.
        note: called if fewer processes could be started.

    Raises:
        OSError: a shard cannot be written.
        StorageError: the storage of the sources fails.
        ShardsError: a process was killed, or none could be started.
        MemoryError: memory is short.
    """
    workspace = Workspace(plan.folder)
    if min(workers, len(shards)) > 1:
        with _started(min(workers, len(shards)), workspace, plan.recipe, skip_bad, note) as processes:
            _feed(processes, shards, skip_bad, report, finished)
        return
    done, going = 0, True

    def proceed(good: bool) -> bool:
        nonlocal done, going
        done, going = done + 1, good or skip_bad
        report(done)
        return going

    for shard in shards:
        if going:
            finished(shard, build_shard(shard, plan.recipe, workspace.staged(shard.file), proceed))


@contextlib.contextmanager
def _started(
    count: int, workspace: Workspace, recipe: Recipe, skip_bad: bool, note: Callable[[str], None]
) -> Iterator[dict[Connection, BaseProcess]]:
    """Start workers, yield them by their pipes, and kill them at the end."""
    context = multiprocessing.get_context("spawn")  # forking a process with threads (of OpenCV, say) can deadlock
    processes: dict[Connection, BaseProcess] = {}
    # Only the parent handles interrupts: workers inherit the blocked signals from their first moment on. The resource
    # tracker, which starts with the first process, would unblock them, so it is started before.
    with _plain_limits(count, 0), safe_path():
        resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        for number in range(count):
            try:
                with _plain_limits(count, number):
                    pipe, process = _start(context, workspace, recipe, skip_bad)
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
            worker.kill()  # its shard is incomplete anyway
            worker.join()
            pipe.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(
    context: SpawnContext, workspace: Workspace, recipe: Recipe, skip_bad: bool
) -> tuple[Connection, BaseProcess]:
    here, there = context.Pipe()
    try:
        process = context.Process(target=_work, args=(there, workspace, recipe, skip_bad), daemon=True)
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
    """Report a failure to start a process as such: it says nothing about the dataset's folder."""
    try:
        yield
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or "too little memory"
        raise ShardsError(f"expected {count} worker processes, got {started}: {reason}; {REMEDY}") from None


def _feed(
    processes: dict[Connection, BaseProcess],
    shards: Sequence[ShardPlan],
    skip_bad: bool,
    report: Callable[[int], None],
    finished: Finished,
) -> None:
    waiting = list(reversed(shards))
    working: dict[Connection, ShardPlan] = {}
    done = 0
    for pipe in processes:
        working[pipe] = waiting.pop()
        _send(pipe, working[pipe])
    while working:
        for pipe in [pipe for pipe in wait(list(working)) if isinstance(pipe, Connection)]:
            record = _receive(pipe, processes[pipe], working[pipe])
            if record is None:
                done += 1
                report(done)
                continue
            finished(working.pop(pipe), record)
            if record.skipped and not skip_bad:
                waiting.clear()
                for other in working:
                    _send(other, None)
            if waiting:
                working[pipe] = waiting.pop()
                _send(pipe, working[pipe])


def _send(pipe: Connection, shard: ShardPlan | None) -> None:
    """Ask a worker to build a shard, or to stop after the image in progress."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it was killed: _receive reports that
        pipe.send(shard)


def _receive(pipe: Connection, process: BaseProcess, shard: ShardPlan) -> ShardRecord | None:
    """Return the record of a worker's finished shard, or None if it has finished one more image."""
    try:
        message = pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        hint = "; if memory was short, try fewer --workers" if process.exitcode == -signal.SIGKILL else ""
        raise ShardsError(
            f"{shard.file}: expected its worker process to succeed, got exit code {process.exitcode}{hint}"
        ) from None
    if isinstance(message, Exception):
        raise message
    assert message is None or isinstance(message, ShardRecord)
    return message


def _work(pipe: Connection, workspace: Workspace, recipe: Recipe, skip_bad: bool) -> None:
    """Build the shards asked for, until the pipe closes."""
    try:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        workspace.join_lock()  # from here on, no other build starts before this process has ended
    except RuntimeError as error:
        with contextlib.suppress(OSError):
            pipe.send(ShardsError(f"{error} in a worker process; {REMEDY}"))
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
        while shard := pipe.recv():
            try:
                message: ShardRecord | Exception = build_shard(shard, recipe, workspace.staged(shard.file), proceed)
            except MemoryError:
                message = MemoryError(SHORT)
            except Exception as error:
                message = error
            pipe.send(message)


def _end_with_parent() -> None:
    """End this process as soon as its parent has ended in any way."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
