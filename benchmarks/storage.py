"""Storage for benchmarks: dropping files from the page cache, counting bytes read, slow mounts, fio."""

import ctypes
import json
import mmap
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loader.pixels.byte_ranges import Ranges

PAGE = mmap.PAGESIZE
STILL_CACHED = 0.01  # fraction of a rival's pages that may stay cached, such as headers that it keeps mapped
_libc = ctypes.CDLL(None, use_errno=True)


def files_in(folder: Path) -> list[Path]:
    """Return all files in a folder, recursively."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def cached_pages(path: Path) -> int:
    """Return how many pages of a file are in the page cache, according to mincore(2)."""
    size = path.stat().st_size
    if not size:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        flags = np.zeros(-(-size // PAGE), np.uint8)
        failed = _libc.mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(flags.ctypes.data)
        )
        number = ctypes.get_errno()
        del view
        if failed:
            raise OSError(number, os.strerror(number), str(path))
    return int((flags & 1).sum())


def forget(paths: Iterable[Path]) -> None:
    """Drop files from the page cache, and check that they are gone.

    Raises:
        RuntimeError: pages are still cached.
    """
    paths = list(paths)
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)  # dirty pages would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    # Rivals with a file per chunk have tens of thousands: check a sample.
    some = paths[:: max(1, len(paths) // 500)]
    left, whole = sum(map(cached_pages, some)), sum(-(-path.stat().st_size // PAGE) for path in some)
    if left > STILL_CACHED * whole + len(some):
        raise RuntimeError(f"{paths[0].parent}: expected a page cache without it, got {left} of {whole} pages there")


def remember(paths: Iterable[Path]) -> None:
    """Read files into the page cache."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def bytes_read() -> int:
    """Return the bytes that this process has read from block devices so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


@dataclass(frozen=True)
class Mounted:
    """A slow mount: its folder, and its log with a line for each request, the size in bytes."""

    folder: Path
    log: Path

    def requests(self) -> tuple[int, int]:
        """Return the requests answered so far, and their bytes."""
        sizes = [int(line) for line in self.log.read_text().split()]
        return len(sizes), sum(sizes)


@contextmanager
def mounted(source: Path, command: str, unmount: str) -> Iterator[Mounted]:
    """Mount a folder for the block, with none of it in the page cache.

    Args:
        source: the folder.
        command: command that mounts it and runs until it is unmounted; contains {source}, {mount} and {log}.
        unmount: command that unmounts it; contains {mount}.
    """
    with tempfile.TemporaryDirectory() as temporary:
        place, log = Path(temporary, "mount"), Path(temporary, "requests.txt")
        place.mkdir()
        log.touch()
        words = [word.format(source=source, mount=place, log=log) for word in shlex.split(command)]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
            try:
                wait_until(lambda: place.is_mount() or process.poll() is not None, "a mount")
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(words)}: expected a mount, got exit code {process.returncode}")
                yield Mounted(place, log)
            finally:
                subprocess.run([word.format(mount=place) for word in shlex.split(unmount)], check=True)
                process.wait(10)


def wait_until(done: object, what: str, seconds: float = 15) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: it did not hold in time.
    """
    assert callable(done)
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"expected {what} within {seconds:.0f} s, got none")
        time.sleep(0.01)


def fio_seconds(folder: Path, files: list[str], ranges: Ranges, in_flight: int) -> float:
    """Return the seconds that fio takes to read ranges of files in this order, bypassing the page cache.

    Args:
        folder: the folder of the files.
        files: their names; `ranges` refers to them by position.
        ranges: whole pages.
        in_flight: number of concurrent requests.
    """
    rows = zip(ranges.shard.tolist(), ranges.start.tolist(), ranges.stop.tolist(), strict=True)
    paths = [folder.resolve() / name for name in files]
    lines = ["fio version 2 iolog", *(f"{path} {action}" for action in ("add", "open") for path in paths)]
    lines += [f"{paths[shard]} read {start} {stop - start}" for shard, start, stop in rows]
    with tempfile.TemporaryDirectory() as temporary:
        log, out = Path(temporary, "requests.log"), Path(temporary, "out.json")
        log.write_text("\n".join([*lines, *(f"{path} close" for path in paths), ""]))
        command = ["fio", "--name=limit", f"--read_iolog={log}", "--replay_no_stall=1", "--direct=1"]
        command += ["--ioengine=libaio", f"--iodepth={in_flight}", "--output-format=json", f"--output={out}"]
        subprocess.run(command, check=True, cwd=temporary, stdout=subprocess.DEVNULL)
        text = out.read_text()
        job = json.loads(text[text.index("{") :])["jobs"][0]["read"]
    if job["total_ios"] != len(ranges):
        raise RuntimeError(f"fio: expected {len(ranges)} requests made, got {job['total_ios']}")
    return float(job["runtime"]) / 1e3
