"""Batches made ahead of time: drawn, asked of the storage, gathered, and handed over in order.

    Pipeline.__next__ ── asks ──> one thread: draw, ask ── gathers ──> some threads: gather ── Job.done ──> __next__

Data and the end of it flow one way. Threads know the flow, never the pipeline, so that it can be dropped while they are
at work. The garbage collector may do that anywhere, in any thread, under any lock: the pipeline's finaliser takes none
and waits for nobody. It tells the first thread, each crew tells the next one, and the last thread closes the reader.
"""

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from loader.ahead.budget import Room
from loader.ahead.reader import Reader, Ticket
from loader.errors import ShardsError
from loader.format.layout import CHANNELS
from loader.pixels.tiles import Pixels
from loader.plan import Crops
from loader.system.crew import Crew, is_worker

SAMPLES_AHEAD = 256  # asked for ahead of their turn, where nothing else is said
EXIT_PATIENCE = 5.0  # seconds for all threads together, when the interpreter ends

Step = TypeVar("Step")
Batch = TypeVar("Batch")
Take = Callable[[tuple[int, ...]], tuple[Batch, Pixels]]


def default_readahead(batch_size: int) -> int:
    """Batches to ask for ahead of their turn: as many as hold SAMPLES_AHEAD samples, at least 2."""
    return max(2, -(-SAMPLES_AHEAD // batch_size))


class Pipeline(Iterator[tuple[Step, Batch, Batch]], Generic[Step, Batch]):
    """Steps in order, each with its batches (n, p, p, 3) and (n, p·scale, p·scale, 3) of uint8.

    Threads start with the first batch. They end, and the reader is closed, when the steps are exhausted, at an error,
    when the pipeline is closed or dropped, or when the interpreter ends. An error is raised once, in its turn.

    Args:
        reader: how to read them.
        steps: what to give.
        draw: gives the crops of a step; another thread calls it when it is time to ask for the batch's data.
        readahead: batches to ask for before those that are being gathered.
        threads: that gather.
        take: gives memory of a shape, and the pixels to write to there; any thread calls it.
        room: the reader's, if it has one.
    """

    def __init__(
        self,
        reader: Reader,
        steps: Iterator[Step],
        draw: Callable[[Step], Crops],
        readahead: int,
        threads: int,
        take: Take[Batch],
        room: Room,
    ) -> None:
        self._flow: _Flow[Step, Batch] = _Flow(reader, draw, threads, take, room)
        self._gatherers = Crew("srshards-gather", self._flow.gather_all, self._flow.end)
        self._asker = Crew("srshards-ask", self._flow.ask_all, self._flow.no_more_asked)
        self._steps, self._ahead, self._threads = steps, readahead + threads, threads
        self._jobs: deque[Job[Step, Batch]] = deque()
        self._process: int | None = None  # whose threads there are
        self._turn = threading.Lock()

    def __next__(self) -> tuple[Step, Batch, Batch]:
        """Give the next batch, and wait for it where need be.

        Raises:
            ShardsError: the threads belong to another process.
            RuntimeError: another thread is waiting for its batch.
        """
        if self._process not in (None, os.getpid()):
            raise ShardsError(
                "batches: expected the process that began to iterate, got one forked from it, without the threads; "
                "call iter() on the PatchLoader there"
            )
        if not self._turn.acquire(blocking=False):
            raise RuntimeError("batches: expected one thread at a time, got a second one; give each its own iterator")
        try:
            return self._next()
        finally:
            self._turn.release()

    def close(self) -> None:
        """End the threads, wait for them, and close the reader; there are no more batches then.

        In a finaliser, drop the pipeline rather than close it.
        """
        self.stop()
        if self._process == os.getpid() and not is_worker():
            self._asker.wait()
            self._gatherers.wait()

    def stop(self) -> None:
        """Tell the threads to end, without waiting and without a lock."""
        self._flow.stop()

    def __del__(self) -> None:
        if flow := vars(self).get("_flow"):
            flow.stop()

    def _next(self) -> tuple[Step, Batch, Batch]:
        flow, jobs = self._flow, self._jobs
        if self._process is None and not flow.stopped():
            self._start()
        while not flow.stopped() and len(jobs) <= self._ahead and (step := next(self._steps, None)) is not None:
            jobs.append(Job(step))
            flow.asks.put(jobs[-1])
        if flow.stopped() or not jobs:  # looked at after `put`: a job behind the end of the line is not waited for
            return self._nothing()
        job = jobs[0]
        if job.result is None:  # it is set before `done`: an interrupt right after `get` leaves nothing to wait for
            job.done.get()
        result = job.result
        if isinstance(result, BaseException):
            try:
                if flow.stopped():
                    return self._nothing()
                self._finish()
                raise result
            finally:
                del result, job  # or the error would hold on to itself, through this frame
        assert result is not None
        jobs.popleft()
        flow.turns.put(None)
        return job.step, *result

    def _nothing(self) -> tuple[Step, Batch, Batch]:
        if _exiting and threading.current_thread().daemon:
            SimpleQueue[None]().get()  # it goes no further, as daemon threads end wherever they are
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
        _running.add(self._flow)
        try:
            self._gatherers.grow(self._threads)
            self._asker.grow(1)
        except BaseException:
            self.stop()
            self._flow.no_more_asked()
            self._gatherers.wait()
            raise


class Job(Generic[Step, Batch]):
    """A step on its way: what was asked for it, and the batches it becomes, or what went wrong."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.asked: tuple[Ticket, Crops] | None = None
        self.result: tuple[Batch, Batch] | BaseException | None = None
        self.done: SimpleQueue[None] = SimpleQueue()

    def end(self, result: tuple[Batch, Batch] | BaseException) -> None:
        """Hand over."""
        self.asked, self.result = None, result
        self.done.put(None)


class StoppedError(Exception):
    """A step that nobody waits for any more."""


class _Flow(Generic[Step, Batch]):
    """What the threads share: the queues between them, and what they work with."""

    def __init__(
        self, reader: Reader, draw: Callable[[Step], Crops], threads: int, take: Take[Batch], room: Room
    ) -> None:
        self._stopped = False
        self.asks: SimpleQueue[Job[Step, Batch] | None] = SimpleQueue()
        self.gathers: SimpleQueue[Job[Step, Batch] | None] = SimpleQueue()
        self.turns: SimpleQueue[None] = SimpleQueue()  # one for each batch that may be gathered before its turn
        self.ended = threading.Event()
        self._reader, self._draw, self._take, self._room = reader, draw, take, room
        for _ in range(threads + 1):
            self.turns.put(None)

    def stop(self) -> None:
        """Let all threads end. It takes no lock: finalisers call it."""
        self._stopped = True
        self._room.close()
        self.asks.put(None)
        self.turns.put(None)

    def stopped(self) -> bool:
        """Whether there is nobody to give batches to."""
        return self._stopped

    def ask_all(self) -> None:
        """What the asking thread does. It has no part in gathering: it must not wait where gathers wait for storage."""
        while (job := self.asks.get()) is not None:
            try:
                if self.stopped():
                    raise StoppedError
                crops = self._draw(job.step)
                job.asked = self._reader.ask(crops), crops
                self.gathers.put(job)
            except BaseException as error:  # for who waits
                job.end(error)
            del job  # and what it became

    def no_more_asked(self) -> None:
        """What it does last."""
        self.gathers.put(None)

    def gather_all(self) -> None:
        """What each gathering thread does. The turn is taken first, so that the first job is always being gathered."""
        while True:
            self.turns.get()
            job = self.gathers.get()
            if job is None:
                break
            try:
                job.end(self._gather(job))
            except BaseException as error:  # for who waits
                job.end(error)
            if self.stopped():
                self.turns.put(None)
            del job
        self.turns.put(None)  # for the next thread
        self.gathers.put(None)

    def end(self) -> None:
        """What the last thread does."""
        try:
            self._reader.close()
        finally:
            _running.discard(self)
            self.ended.set()

    def _gather(self, job: Job[Step, Batch]) -> tuple[Batch, Batch]:
        if self.stopped() or job.asked is None:
            raise StoppedError
        ticket, crops = job.asked
        (lr, lr_pixels), (hr, hr_pixels) = (
            self._take((len(crops.image), side, side, CHANNELS)) for side in self._reader.sides
        )
        ticket.gather(lr_pixels, hr_pixels)
        return lr, hr


_running: set[_Flow[Any, Any]] = set()
_exiting: list[bool] = []
os.register_at_fork(after_in_child=_running.clear)


@atexit.register
def _end_all() -> None:
    """Leave no thread at work in compiled code when the interpreter goes; storage that is dead is not waited for."""
    _exiting.append(True)
    flows, until = list(_running), time.monotonic() + EXIT_PATIENCE
    for flow in flows:
        flow.stop()
    for flow in flows:
        flow.ended.wait(max(until - time.monotonic(), 0))
