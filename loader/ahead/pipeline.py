"""Batches made ahead of time: drawn, requested from storage, gathered, and returned in order.

    Pipeline.__next__ ── to_ask ──> one thread: draw, ask ── to_gather ──> some threads: gather ── Job.done ──> __next__

Jobs flow one way, and so does the end: the pipeline tells the asking thread, that one tells the gathering threads, and
the last of them closes the reader. The threads hold the queues but not the pipeline, so that a pipeline can be dropped
while they work. The garbage collector may drop it anywhere, in any thread, under any lock: its finaliser takes no lock
and waits for nothing.
"""

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from loader.ahead.reader import Gather, Reader
from loader.errors import ShardsError
from loader.format.layout import CHANNELS
from loader.pixels.tiles import Pixels
from loader.plan import Crops
from loader.system.crew import Crew, is_worker

SAMPLES_AHEAD = 256  # default read-ahead, in samples
EXIT_PATIENCE = 5.0  # seconds to wait for all threads at interpreter exit

Step = TypeVar("Step")
Batch = TypeVar("Batch")
Allocate = Callable[[tuple[int, ...]], tuple[Batch, Pixels]]


def default_readahead(batch_size: int) -> int:
    """Return how many batches to request ahead by default: as many as hold SAMPLES_AHEAD samples, at least 2."""
    return max(2, -(-SAMPLES_AHEAD // batch_size))


class Pipeline(Iterator[tuple[Step, Batch, Batch]], Generic[Step, Batch]):
    """An iterator over (step, LR batch, HR batch), in order of the steps.

    Threads start with the first batch. They stop, and the reader is closed, when the steps are exhausted, on an error,
    when the pipeline is closed or dropped, and at interpreter exit. An error is raised once, in place of its batch.

    Args:
        reader: how to read them; closed by the pipeline.
        steps: what to make batches of.
        draw: returns the crops of a step; called by another thread.
        readahead: batches to request beyond those being gathered.
        threads: number of gathering threads.
        allocate: returns a batch of a shape (n, side, side, 3), and its pixels to write to; called by any thread.
    """

    def __init__(
        self,
        reader: Reader,
        steps: Iterator[Step],
        draw: Callable[[Step], Crops],
        readahead: int,
        threads: int,
        allocate: Allocate[Batch],
    ) -> None:
        self._stages: _Stages[Step, Batch] = _Stages(reader, draw, threads, allocate)
        self._gatherers = Crew("srshards-gather", self._stages.run_gatherer, self._stages.close_reader)
        self._asker = Crew("srshards-ask", self._stages.run_asker, self._stages.end_asking)
        self._steps, self._ahead, self._threads = steps, readahead + threads, threads
        self._jobs: deque[Job[Step, Batch]] = deque()
        self._process: int | None = None  # the process that started the threads
        self._in_use = threading.Lock()

    def __next__(self) -> tuple[Step, Batch, Batch]:
        """Return the next batch; wait for it if necessary.

        Raises:
            ShardsError: the threads belong to another process.
            RuntimeError: another thread is waiting for its batch.
        """
        if self._process not in (None, os.getpid()):
            raise ShardsError(
                "batches: expected the process that began to iterate, got one forked from it, without the threads; "
                "call iter() on the PatchLoader there"
            )
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError("batches: expected one thread at a time, got a second one; give each its own iterator")
        try:
            return self._next()
        finally:
            self._in_use.release()

    def close(self) -> None:
        """Stop the threads, wait for them, and close the reader; no batches follow.

        In a finaliser, drop the pipeline instead.
        """
        self.stop()
        if self._process == os.getpid() and not is_worker():
            self._asker.wait()
            self._gatherers.wait()

    def stop(self) -> None:
        """Tell the threads to stop, without waiting and without a lock."""
        self._stages.stop()

    def __del__(self) -> None:
        if stages := vars(self).get("_stages"):
            stages.stop()

    def _next(self) -> tuple[Step, Batch, Batch]:
        stages, jobs = self._stages, self._jobs
        if self._process is None and not stages.stopped():
            self._start()
        while not stages.stopped() and len(jobs) <= self._ahead and (step := next(self._steps, None)) is not None:
            jobs.append(Job(step))
            stages.to_ask.put(jobs[-1])
        if stages.stopped() or not jobs:  # checked after `put`: nothing serves a job that comes after the end
            return self._no_more()
        job = jobs[0]
        if job.result is None:  # set before `done`: an interrupt right after `get` does not make the next call wait
            job.done.get()
        result = job.result
        if isinstance(result, BaseException):
            try:
                if stages.stopped():
                    return self._no_more()
                self._finish()
                raise result
            finally:
                del result, job  # otherwise the error would keep itself alive through this frame
        assert result is not None
        jobs.popleft()
        stages.permits.put(None)
        return job.step, *result

    def _no_more(self) -> tuple[Step, Batch, Batch]:
        if _exiting and threading.current_thread().daemon:
            SimpleQueue[None]().get()  # block until the interpreter is gone, as daemon threads do
        self._finish()
        raise StopIteration

    def _finish(self) -> None:
        self._jobs.clear()
        self.close()

    def _start(self) -> None:
        if _exiting:
            self.stop()
            return
        self._process = os.getpid()
        _running.add(self._stages)
        try:
            self._gatherers.grow(self._threads)
            self._asker.grow(1)
        except BaseException:
            self.stop()
            self._stages.end_asking()
            self._gatherers.wait()
            raise


class Job(Generic[Step, Batch]):
    """A step on its way through the pipeline, and the batches it becomes, or the error."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.count = 0
        self.gather: Gather | None = None  # from the request until the result
        self.result: tuple[Batch, Batch] | BaseException | None = None
        self.done: SimpleQueue[None] = SimpleQueue()

    def finish(self, result: tuple[Batch, Batch] | BaseException) -> None:
        """Set the result."""
        self.gather, self.result = None, result
        self.done.put(None)


class _Stages(Generic[Step, Batch]):
    """What the threads share: their queues, and what they work with."""

    def __init__(self, reader: Reader, draw: Callable[[Step], Crops], threads: int, allocate: Allocate[Batch]) -> None:
        self._stopped = False
        self.to_ask: SimpleQueue[Job[Step, Batch] | None] = SimpleQueue()
        self.to_gather: SimpleQueue[Job[Step, Batch] | None] = SimpleQueue()
        self.permits: SimpleQueue[None] = SimpleQueue()  # one per batch that may be gathered ahead of time
        self.ended = threading.Event()
        self._reader, self._draw, self._allocate = reader, draw, allocate
        for _ in range(threads + 1):
            self.permits.put(None)

    def stop(self) -> None:
        """Let all threads return. Takes no lock, so finalisers may call it."""
        self._stopped = True
        self._reader.cancel()
        self.to_ask.put(None)
        self.permits.put(None)

    def stopped(self) -> bool:
        """Return whether no more batches are wanted."""
        return self._stopped

    def run_asker(self) -> None:
        """Draw and request jobs, in a thread of its own, so that slow gathers do not delay requests."""
        while (job := self.to_ask.get()) is not None:
            try:
                if self.stopped():
                    raise CancelledError
                crops = self._draw(job.step)
                job.count, job.gather = len(crops), self._reader.ask(crops)
                self.to_gather.put(job)
            except BaseException as error:  # raised by __next__
                job.finish(error)
            del job  # it keeps the batch alive

    def end_asking(self) -> None:
        """Tell the gathering threads that no jobs follow."""
        self.to_gather.put(None)

    def run_gatherer(self) -> None:
        """Gather jobs. Each takes its permit first, so that the oldest job is never left without one."""
        while True:
            self.permits.get()
            job = self.to_gather.get()
            if job is None:
                break
            try:
                job.finish(self._gather(job))
            except BaseException as error:  # raised by __next__
                job.finish(error)
            if self.stopped():
                self.permits.put(None)
            del job
        self.permits.put(None)  # for the next thread
        self.to_gather.put(None)

    def close_reader(self) -> None:
        """Close the reader, once all threads are done with it."""
        try:
            self._reader.close()
        finally:
            _running.discard(self)
            self.ended.set()

    def _gather(self, job: Job[Step, Batch]) -> tuple[Batch, Batch]:
        if self.stopped() or job.gather is None:
            raise CancelledError
        patch = self._reader.patch
        lr, lr_pixels = self._allocate((job.count, patch.lr, patch.lr, CHANNELS))
        hr, hr_pixels = self._allocate((job.count, patch.hr, patch.hr, CHANNELS))
        job.gather(lr_pixels, hr_pixels)
        return lr, hr


_running: set[_Stages[Any, Any]] = set()
_exiting: list[bool] = []
os.register_at_fork(after_in_child=_running.clear)


@atexit.register
def _stop_all() -> None:
    """Leave no thread in compiled code when the interpreter exits, but do not wait for storage that hangs."""
    _exiting.append(True)
    running, deadline = list(_running), time.monotonic() + EXIT_PATIENCE
    for stages in running:
        stages.stop()
    for stages in running:
        stages.ended.wait(max(deadline - time.monotonic(), 0))
