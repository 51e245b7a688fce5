"""Measuring in separate processes, so that each way has its own threads, memory maps and counters."""

import functools
import importlib
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext

from crops import Task
from reading import Start, Way
from storage import bytes_read
from ways import MODES

PATIENCE = 600  # seconds to wait for an answer
HEAVY = ["torch", "loader.batches", "prep.build.build", "cv2", "h5py", "lmdb", "zarr", "tensorstore"]


@dataclass(frozen=True)
class Reading:
    """What one way did in one round: samples, seconds, and, if counted, bytes read from storage and requests."""

    samples: int
    seconds: float
    cpu_seconds: float = 0.0
    bytes_read: int = 0
    requests: int = 0

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.samples / self.seconds


@dataclass(frozen=True)
class Order:
    """A request to read with the way of that name, for so many seconds or samples (0: any number).

    endless: repeat the samples, instead of reading each once.
    """

    way: str
    seconds: float
    endless: bool
    most: int = 0


class Child:
    """A process that can read in one or several ways."""

    def __init__(self, mode: str, names: list[str], task: Task, environment: Mapping[str, str]) -> None:
        ours, theirs = multiprocessing.Pipe()
        self._connection = ours
        context: ForkServerContext | SpawnContext = _fork_server()
        if environment:  # modules read it at import: only a spawned process sees it
            context = multiprocessing.get_context("spawn")
        before = {key: os.environ.get(key) for key in environment}
        os.environ.update(environment)
        try:
            self._process = context.Process(target=_serve, args=(theirs, mode, names, task), daemon=True)
            self._process.start()
        finally:
            for key, value in before.items():
                os.environ.pop(key)
                if value is not None:
                    os.environ[key] = value
        theirs.close()
        self._answer()

    def read(self, order: Order) -> Reading:
        """Make one way read; return its reading."""
        self._connection.send(order)
        reading = self._answer()
        assert isinstance(reading, Reading)
        return reading

    def close(self) -> None:
        """End the process, which closes its files."""
        self._connection.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self) -> object:
        if not self._connection.poll(PATIENCE):
            raise TimeoutError(f"measuring process: expected an answer within {PATIENCE} s, got none")
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"measuring process: ended with code {self._process.exitcode}") from None


@contextmanager
def child(mode: str, ways: list[Way], task: Task) -> Iterator[Child]:
    """Run a process for ways of one mode during the block."""
    process = Child(mode, [way.name for way in ways], task, dict(ways[0].environment))
    try:
        yield process
    finally:
        process.close()


@functools.cache
def _fork_server() -> ForkServerContext:
    """Return a context that forks processes from one that has imported everything, and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in HEAVY if importlib.util.find_spec(name)])
    return context


def _serve(connection: Connection, mode: str, names: list[str], task: Task) -> None:
    import cv2
    import torch

    if task.cores:
        os.sched_setaffinity(0, task.cores)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    ways: dict[str, Start] = {way.name: way.open(task) for way in MODES[mode] if way.name in names}
    connection.send("ready")
    while True:
        try:
            order: Order = connection.recv()
        except EOFError:
            return
        connection.send(_read(ways[order.way], order))


def _read(start: Start, order: Order) -> Reading:
    io, cpu, begin = bytes_read(), time.process_time(), time.perf_counter()
    samples, batches = 0, start(order.endless)
    for count in batches:
        samples += count
        if time.perf_counter() - begin >= order.seconds or 0 < order.most <= samples:
            break
    done = Reading(samples, time.perf_counter() - begin, time.process_time() - cpu)
    batches.close()  # type: ignore[attr-defined]
    return replace(done, bytes_read=bytes_read() - io)
