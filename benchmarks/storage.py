"""The storage under a benchmark: forgetting files that the page cache holds, counting bytes read, slow mounts, fio."""

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
STILL_CACHED = 0.01  # share of a rival's pages that may stay: those of headers, and the like, that it keeps mapped
_libc = ctypes.CDLL(None, use_errno=True)


def files_in(folder: Path) -> list[Path]:
    """All files in a folder and in those within it."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def cached_pages(path: Path) -> int:
    """How many pages of a file the page cache holds, as mincore(2) tells."""
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
    """Drop files from the page cache, and make sure that they are gone.

    Raises:
        RuntimeError: pages are still there.
    """
    paths = list(paths)
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)  # pages not yet written would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    # A file for every chunk makes tens of thousands: a sample of them tells as much.
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
    """Bytes that this process has made block devices read so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


@dataclass(frozen=True)
class Mounted:
    """A slow mount: its folder, and the log with a line for each request, the size in bytes."""

    folder: Path
    log: Path

    def requests(self) -> tuple[int, int]:
        """Requests answered so far, and their bytes."""
        sizes = [int(line) for line in self.log.read_text().split()]
        return len(sizes), sum(sizes)


@contextmanager
def mounted(source: Path, command: str, unmount: str) -> Iterator[Mounted]:
    """A folder mounted anew, with nothing of it in the page cache.

    Args:
        source: the folder.
        command: mounts it and runs until it is unmounted; with {source}, {mount} and {log} in it.
        unmount: unmounts; with {mount} in it.
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
    """Wait for something that a callable tells.

    Raises:
        TimeoutError: it did not happen in time.
    """
    assert callable(done)
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"expected {what} within {seconds:.0f} s, got none")
        time.sleep(0.01)


def fio_seconds(folder: Path, files: list[str], ranges: Ranges, in_flight: int) -> float:
    """How long fio takes to read ranges of files in the order given, past the page cache.

    Args:
        folder: holds the files.
        files: their names, by the number that stands in `ranges`.
        ranges: whole pages.
        in_flight: requests under way at a time.
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
