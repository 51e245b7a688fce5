"""A dataset may have more shards than the process may have files; what is dropped leaves nothing open or mapped."""

import errno
import gc
import os
import resource
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import build, photograph, write_image

from loader import FormatError, PatchDataset, PatchLoader
from loader.format.index_text import dump_index
from loader.format.layout import HR, INDEX, PAGE, Index, LrOrigin, Plane, Shard, Strings
from loader.pixels.files import Files
from loader.pixels.shards import Shards
from loader.system import descriptors
from loader.system.descriptors import OpenFile, Table

COUNT = 1000


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand shards of one image of 16 × 16 each, every one of another colour."""
    folder = tmp_path_factory.mktemp("many")
    length = 2 * PAGE
    for i in range(COUNT):
        pixels = np.full(length, i % 251, np.uint8)
        (folder / f"shard-{i:05d}.raw").write_bytes(pixels.tobytes())
    numbers, side = np.arange(COUNT), np.full(COUNT, 16)
    planes = {
        scale: Plane(16, np.full(COUNT, offset), np.zeros(COUNT, np.int64), sources, digests)
        for scale, offset, sources, digests in (
            (HR, 0, Strings([f"{i}.png" for i in range(COUNT)]), Strings(["0" * 64] * COUNT)),
            (2, PAGE, None, None),
        )
    }
    shards = tuple(Shard(f"shard-{i:05d}.raw", length, "0" * 64) for i in range(COUNT))
    names = Strings([f"i{i}" for i in range(COUNT)])
    index = Index(
        container="raw",
        made_by="a test",
        libraries={},
        lr=LrOrigin("imresize", "matlab-uint8", "symmetric"),
        images_per_shard=1,
        shards=shards,
        name=names,
        shard=numbers,
        height=side,
        width=side,
        planes=planes,
    )
    (folder / INDEX).write_bytes(dump_index(index))
    return folder


def run(code: str, timeout: int = 170) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr == ""
    return done.stdout


READ_ALL = """
import faulthandler, os, resource
from loader import ImageDataset, PatchDataset, PatchLoader
import torch
faulthandler.dump_traceback_later(150, exit=True)
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
data = PatchDataset({folder!r}, 2, 8, length=2000)
def check(batches):
    seen = set()
    for lr, hr in batches:
        assert (lr.amax((1, 2, 3)) == lr.amin((1, 2, 3))).all()
        assert (hr[:, 0, 0, 0] == lr[:, 0, 0, 0]).all()
        seen |= set(lr[:, 0, 0, 0].tolist())
    assert len(seen) > 240
"""


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_a_thousand_shards_and_forty_files(many: Path, io: str) -> None:
    code = (
        READ_ALL.format(folder=str(many), soft=40, hard=40)
        + f"""
loader = PatchLoader(data, 32, epochs=1, io={io!r}, threads=4)
check(loader)
images = ImageDataset({str(many)!r}, 2)
for i in range(0, 1000, 7): images[i]
assert len(os.listdir("/proc/self/fd")) <= 40
free = [os.open("/dev/null", os.O_RDONLY) for _ in range(8)]  # some are left to the rest of the process
print("read")
"""
    )
    assert run(code) == "read\n"


@pytest.mark.long
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_a_thousand_shards_with_workers(many: Path, io: str) -> None:
    code = (
        READ_ALL.format(folder=str(many), soft=128, hard=128)
        + f"""
import functools
from loader import dataset
dataset.open_reader = functools.partial(dataset.open_reader, io={io!r})
check(torch.utils.data.DataLoader(data, 64, num_workers=2, multiprocessing_context="fork"))
print("read")
"""
    )
    assert run(code) == "read\n"


@pytest.mark.long
def test_the_soft_limit_is_raised_where_that_helps(many: Path) -> None:
    code = (
        READ_ALL.format(folder=str(many), soft=40, hard=300)
        + """
check(PatchLoader(data, 32, epochs=1, io="pread"))
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    )
    assert run(code) == "(300, 300)\n"


@pytest.mark.parametrize("io", [pytest.param("mmap", marks=pytest.mark.long), "pread"])
def test_no_descriptor_at_all_has_its_message(many: Path, io: str) -> None:
    """Whatever else took them all; and once there are some again, reading goes on."""
    code = (
        READ_ALL.format(folder=str(many), soft=40, hard=40)
        + f"""
taken = []
try:
    while True: taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError: pass
for spare in range(2):
    for read in (lambda: next(iter(PatchLoader(data, 4, io={io!r}))), lambda: ImageDataset(data.shards.folder, 2)):
        try: print(read())
        except Exception as error: print(type(error).__name__, error)
    os.close(taken.pop())
for _ in range(8): os.close(taken.pop())
print(len(next(iter(PatchLoader(data, 4, io={io!r})))[0]))
"""
    )
    lines = run(code).splitlines()
    assert "FormatError" in lines[0]
    assert "Too many open files: this process may have 40 (ulimit -n raises that limit)" in lines[0]
    assert all(line.startswith("FormatError") for line in lines[:3:2])
    assert lines[-1] == "4"


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def mapped(folder: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(folder))


def test_a_dropped_dataset_leaves_nothing(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loader import dataset
    from loader.ahead import reader as readahead

    for io in ("mmap", "pread"):
        monkeypatch.setattr(dataset, "open_reader", lambda a, b, c, io=io: readahead.open_reader(a, b, c, io))
        before = open_files()
        for _ in range(3):
            data = PatchDataset(many, 2, 8)
            data[1], data[2]
            del data
            gc.collect()
        for _ in range(3000):
            if open_files() <= before and not mapped(many):
                break
            threading.Event().wait(0.02)
        assert open_files() <= before
        assert mapped(many) == 0


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_view_keeps_its_file_mapped(many: Path) -> None:
    shards = Shards(many)
    tiles = shards.tiles(5, HR)
    part = tiles[0, 0, 2:4, 3]
    assert mapped(many) == 1
    del shards, tiles
    gc.collect()
    assert mapped(many) == 1
    assert (part == 5).all()
    assert not part.flags.writeable
    pid = os.fork()
    if not pid:
        os._exit(0 if (part == 5).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    del part
    gc.collect()
    assert mapped(many) == 0


def test_threads_that_map_one_shard_at_once(many: Path) -> None:
    shards = Shards(many)
    start = threading.Barrier(8)

    def use() -> None:
        start.wait()
        for i in range(50):
            assert shards.tiles(i, HR)[0, 0, 0, 0, 0] == i

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mapped(many) == 50
    assert all(shards.address(np.array([i]))[0] == shards._maps[i].ctypes.data for i in range(50))


class Limited(Table):
    """A table of so many descriptors, which counts what is open at a time."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most, self._raised = most, True


def test_no_read_loses_its_descriptor(tmp_path: Path) -> None:
    """Many threads, many files, a small table: each reads its own file, and few are open."""
    for i in range(30):
        (tmp_path / str(i)).write_bytes(bytes([i]) * 8)
    table, caches, most = Limited(6), [{}, {}], [0]  # type: ignore[var-annotated]
    errors: list[BaseException] = []

    def use(seed: int) -> None:
        try:
            for i in np.random.default_rng(seed).integers(0, 30, 400).tolist():
                cache = caches[i % 2]
                opening = lambda i=i: os.open(tmp_path / str(i), os.O_RDONLY)  # noqa: E731
                with table.use(cache, i, str(i), opening) as descriptor:
                    most[0] = max(most[0], len([file for file in list(table._files) if file.descriptor >= 0]))
                    assert os.pread(descriptor, 8, 0) == bytes([i]) * 8
        except BaseException as error:
            errors.append(error)

    before = open_files()
    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert 2 <= most[0] <= 6
    assert open_files() <= before + 6
    caches.clear()
    gc.collect()
    assert open_files() == before


def test_the_file_read_longest_ago_goes_first(tmp_path: Path) -> None:
    table, cache = Limited(6), {}  # type: ignore[var-annotated]
    opened: Counter[int] = Counter()

    def read(i: int) -> None:
        def opening() -> int:
            opened[i] += 1
            return os.open("/dev/null", os.O_RDONLY)

        with table.use(cache, i, str(i), opening):
            pass

    for i in (1, 2, 3, 4, 1, 5, 1, 6, 1):
        read(i)
    assert opened[1] == 1
    read(2)
    assert opened[2] == 2


def test_close_goes_on_after_a_failure(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(many, Shards(many).index)
    before = open_files()
    for shard in range(5):
        files.read(shard, 0, np.empty(8, np.uint8))
    assert open_files() == before + 5
    closed: list[int] = []

    def close(descriptor: int) -> None:
        os.close(descriptor)
        closed.append(descriptor)
        if len(closed) == 2:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(OpenFile.close, "__defaults__", (close,))
    with pytest.raises(OSError, match=r"Input/output error: '.*shard-0000\d.raw'"):
        files.close()
    assert len(closed) == 5
    assert open_files() == before
    files.close()


@pytest.mark.parametrize("code", [errno.ENOTCONN, errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_a_mount_that_died(many: Path, monkeypatch: pytest.MonkeyPatch, code: int, io: Any) -> None:
    """Errors of the storage name the file and say what it said."""

    def dead(*_: Any) -> Any:
        raise OSError(code, os.strerror(code))

    data = PatchDataset(many, 2, 8)
    if io == "pread":
        monkeypatch.setattr(os, "preadv", dead)
    else:
        monkeypatch.setattr("loader.pixels.files.open_member", dead)
    with pytest.raises(FormatError, match=rf"shard-\d+.raw: expected .*, got {os.strerror(code)}"):
        next(iter(PatchLoader(data, 2, io=io)))


@pytest.mark.parametrize("io", ["auto", "mmap", "pread"])
def test_a_dataset_that_moved_before_its_first_read(tmp_path: Path, io: Any) -> None:
    write_image(tmp_path / "in/a.png", photograph(64, 64))
    data = PatchDataset(build(tmp_path / "in", tmp_path / "out"), 4, 8)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    reads: list[Callable[[], object]] = [lambda: data[0], lambda: next(iter(PatchLoader(data, 2, io=io)))]
    for read in reads:
        with pytest.raises(FormatError, match="expected a file that can be read, got No such file or directory"):
            read()


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("kind", ["a pipe", "a link out of the folder", "a folder", "a device"])
def test_a_shard_that_something_else_replaced(tmp_path: Path, io: Any, kind: str) -> None:
    """After the dataset was opened; nothing waits for a pipe, and no other file is read."""
    write_image(tmp_path / "in/a.png", photograph(64, 64))
    data = PatchDataset(build(tmp_path / "in", tmp_path / "out"), 4, 8)
    shard = tmp_path / "out" / data.shards.index.shards[0].file
    shard.rename(tmp_path / "victim")
    if kind == "a pipe":
        os.mkfifo(shard)
    elif kind == "a folder":
        shard.mkdir()
    else:
        shard.symlink_to(tmp_path / "victim" if "link" in kind else "/dev/zero")
    with pytest.raises(FormatError, match="expected a file that can be read, got "):
        next(iter(PatchLoader(data, 2, io=io)))


def test_few_descriptors_are_kept(many: Path) -> None:
    """As many as the process can spare, and not the limit of a generous system."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert descriptors.FEWEST <= descriptors._spare() <= min(descriptors.MOST, soft)
