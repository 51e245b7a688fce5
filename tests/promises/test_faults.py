"""Failing storage: at every write, sync, open and rename, at any byte, and on a full disk.

After each fault there is one message and no incomplete dataset, and the same command resumes to the same bytes.
"""

import contextlib
import errno
import io
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from helpers import Build, digests, photograph, write_image
from helpers import build as typed_build

import prep.build.resources
from loader.errors import ShardsError
from loader.format.index import read_index

build: Build = typed_build
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small images, in ascending size."""
    folder = tmp_path_factory.mktemp("few")
    for i, size in enumerate([(64, 64), (130, 70), (99, 201)]):
        write_image(folder / f"{i}.png", photograph(*size, seed=i))
    return folder


@pytest.fixture(scope="module", params=["hdf5", "raw"])
def one_each(request: pytest.FixtureRequest) -> Build:
    """`build` with one image per shard, in each container."""

    def run(source: Path, out: Path, **changes: object) -> Path:
        return build(source, out, **({"container": request.param, "images_per_shard": 1} | changes))

    return run


@pytest.fixture(scope="module")
def expected(one_each: Build, images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an undisturbed build."""
    return digests(one_each(images, tmp_path_factory.mktemp("undisturbed") / "out"))


class Storage:
    """Stand-in for the system calls that change files; one of them fails.

    Args:
        fail: the number of the call that fails; None for no failure.
        short: the most bytes written at once.
    """

    def __init__(self, fail: int | None, short: int | None = None) -> None:
        self.calls: list[str] = []
        self._fail, self._short = fail, short

    def call(self, name: str) -> None:
        """Count a call; raise if it is the one to fail."""
        self.calls.append(name)
        if len(self.calls) - 1 == self._fail:
            code = ERRORS[self._fail % len(ERRORS)]
            raise OSError(code, os.strerror(code))

    @contextlib.contextmanager
    def installed(self) -> Iterator["Storage"]:
        """Replace the real calls."""
        storage, open_file, open_descriptor = self, os.open, os.fdopen

        class File(io.FileIO):
            def write(self, data: object) -> int:
                storage.call("write")
                return super().write(memoryview(data)[: storage._short])  # type: ignore[arg-type]

        def opened(path: object, flags: int, *args: object, **options: object) -> int:
            if flags & os.O_CREAT:
                storage.call("open")
            return open_file(path, flags, *args, **options)  # type: ignore[arg-type]

        def buffered(descriptor: int, mode: str = "r", *args: object, **options: object) -> object:
            if not set(mode) & set("wxa"):
                return open_descriptor(descriptor, mode, *args, **options)  # type: ignore[call-overload]
            return io.BufferedWriter(File(descriptor, mode.replace("b", "")))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "open", opened)
            patch.setattr(os, "fdopen", buffered)
            for owner, name in (
                (os, "fsync"),
                (os, "pwrite"),
                (os, "ftruncate"),
                (Path, "mkdir"),
                (Path, "rename"),
                (Path, "unlink"),
            ):
                patch.setattr(owner, name, self._counted(name, getattr(owner, name)))
            yield self

    def _counted(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **options: object) -> object:
            self.call(name)
            return function(*args, **options)

        return counted


def resumes(one_each: Build, images: Path, out: Path, expected: dict[str, str], error: ShardsError) -> int:
    """Check what is promised after a fault; return the number of shards kept."""
    text = str(error)
    assert "could not be written: " in text
    kept = len([path for path in out.glob("shard-*") if path.suffix in (".h5", ".raw")]) if out.exists() else 0
    if not (out / "index.json").exists():
        state = [f"{kept} of 3 shards are finished; run the same command to resume"] * bool(kept)
        assert text.splitlines()[1:] == state
    assert kept or not out.exists()
    one_each(images, out)
    assert digests(out) == expected
    return kept


def test_a_fault_at_every_call(
    one_each: Build, images: Path, tmp_path: Path, expected: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    failed: dict[str, int] = {}
    kept = [0] * 4
    for number in count():
        out = tmp_path / str(number)
        with Storage(number).installed() as storage:
            try:
                one_each(images, out)
                break
            except ShardsError as caught:
                error = caught
        name = storage.calls[number]
        failed[name] = failed.get(name, 0) + 1
        kept[resumes(one_each, images, out, expected, error)] += 1
    assert digests(out) == expected
    assert all(kept), kept  # faults before any shard was finished, and after one, two and all three
    assert failed.keys() >= {"write", "fsync", "open", "rename", "unlink", "pwrite", "mkdir"}
    with capsys.disabled():
        print(f"\n{number} faults, one at each call {failed}; shards kept: {dict(enumerate(kept))}")


def test_short_writes(one_each: Build, images: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    with Storage(None, short=50).installed() as storage:
        one_each(images, tmp_path / "out")
    assert storage.calls.count("write") > 20
    assert digests(tmp_path / "out") == expected


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let any write beyond so many bytes of a file fail, in C code, too; the last one before is short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_fault_at_any_byte(
    one_each: Build, images: Path, tmp_path: Path, expected: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = [shard.bytes for shard in read_index(one_each(images, tmp_path / "whole")).shards]
    limits = sorted({*range(0, 1200, 149), *range(1200, max(lengths), 6007), *(n - 1 for n in lengths), *lengths})
    kept = [0] * 4
    for limit in limits:
        out = tmp_path / str(limit)
        with files_up_to(limit):
            try:
                one_each(images, out)
                continue
            except ShardsError as caught:
                error = caught
        kept[resumes(one_each, images, out, expected, error)] += 1
    assert kept[0]
    assert kept[1]
    with capsys.disabled():
        print(f"\n{sum(kept)} faults at limits of 0 to {limits[-1]} bytes; shards kept: {dict(enumerate(kept))}")


@pytest.mark.parametrize("limit", [3000, 100_000])
def test_a_fault_in_a_worker(
    one_each: Build, images: Path, tmp_path: Path, expected: dict[str, str], limit: int
) -> None:
    with files_up_to(limit), pytest.raises(ShardsError) as caught:
        one_each(images, tmp_path / "out", workers=2)
    resumes(one_each, images, tmp_path / "out", expected, caught.value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A function that mounts and resizes a small file system, given its pages; skipped if mounting is not permitted."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(pages: int, *options: str) -> bool:
        words = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={pages * 4096}"]), "tmpfs", str(place)]
        try:
            return subprocess.run(words, capture_output=True, check=False).returncode == 0
        except OSError:
            return False

    if not mount(16):
        pytest.skip("mounting a tmpfs is not permitted")

    def size(pages: int) -> Path:
        assert mount(pages, "remount")
        return place

    yield size
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(
    one_each: Build,
    images: Path,
    expected: dict[str, str],
    small_disk: Callable[[int], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept, large = [0] * 4, 1000
    with pytest.raises(ShardsError, match=r"expected [\d.]+ MB of free space .* got [\d.]+ MB; [\d.]+ MB more needed"):
        one_each(images, small_disk(50) / "out")
    assert not (small_disk(50) / "out").exists()
    # From here on the disk fills up after the check.
    monkeypatch.setattr(prep.build.resources, "check_space", lambda *_: None)
    for pages in range(1, 200, 4):
        out = small_disk(pages) / "out"
        try:
            one_each(images, out)
        except ShardsError as error:
            small_disk(large)
            kept[resumes(one_each, images, out, expected, error)] += 1
        assert digests(out) == expected
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
    assert sum(kept) > 10
    assert kept[1] + kept[2] + kept[3] > 0
    with capsys.disabled():
        print(f"\n{sum(kept)} times a full disk; shards kept: {dict(enumerate(kept))}")
