"""Resource limits (`ulimit`): a build succeeds, or ends with one line that names what is short. It never hangs."""

import errno
import os
import resource
import subprocess
import sys
import threading
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from helpers import Build, digests, make_recipe, photograph, write_image
from helpers import build as typed_build

from loader.errors import ShardsError
from loader.system import limits
from loader.system.limits import PER_THREAD, affordable_threads
from loader.system.threads import in_threads
from prep.build import memory, pool
from prep.build.memory import Load, fitting_workers
from prep.shard.shard import build_shard

build: Build = typed_build
RECIPE = make_recipe(scales=(2,), container="raw", images_per_shard=1)


@pytest.mark.parametrize("megabytes", [900, 600])
def test_little_address_space(tmp_path: Path, megabytes: int) -> None:
    for i in range(20):
        write_image(tmp_path / f"in/{i}.png", photograph(64, 64, i))
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({megabytes} << 20, {megabytes} << 20))\n"
        "from prep.cli import main\n"
        "if __name__ == '__main__': main()"
    )
    (tmp_path / "limited.py").write_text(code)
    words = ["build-shards", "in", "--scale", "2", "--workers", "2", "--images-per-shard", "1", "--out", "out"]
    run = subprocess.run(
        [sys.executable, "limited.py", *words], capture_output=True, text=True, cwd=tmp_path, check=False, timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert "Traceback" not in run.stderr, run.stderr
    assert run.returncode in (0, 1)
    assert (run.returncode == 0) == (tmp_path / "out/index.json").exists()
    if run.returncode:
        assert run.stderr.startswith("Error: expected "), run.stderr


def test_threads_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """All results arrive, in order, however few threads can be started."""
    true = threading.Thread.start
    for most in (0, 1, 3):
        started = [0]

        def start(thread: threading.Thread, started: list[int] = started, most: int = most) -> None:
            if started[0] == most:
                raise RuntimeError("can't start new thread")
            started[0] += 1
            true(thread)

        monkeypatch.setattr(threading.Thread, "start", start)
        assert list(in_threads(lambda n: n * n, range(20), 8)) == [n * n for n in range(20)]


def test_threads_are_limited_by_address_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "address_space", lambda: None)
    assert affordable_threads(16) == 16
    monkeypatch.setattr(limits, "address_space", lambda: 7 * PER_THREAD)
    assert affordable_threads(16) == 3
    monkeypatch.setattr(limits, "address_space", lambda: PER_THREAD)
    assert affordable_threads(16) == 0
    monkeypatch.undo()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 45, 1 << 45))
    space = limits.address_space()
    assert space is not None
    assert 0 < space < 1 << 45


def test_an_image_larger_than_the_address_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "address_space", lambda: 1 << 30)
    with pytest.raises(ShardsError, match=r"expected 2,168 MB of address space .* got 1,074 MB left \(ulimit -v\)"):
        fitting_workers(1, Load(pixels=100_000_000, file=0), RECIPE, tmp_path)


def test_large_files_need_memory_too(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 2000000 kB\n")
    assert fitting_workers(4, Load(pixels=1000, file=0), RECIPE, tmp_path) == 4
    assert fitting_workers(4, Load(pixels=1000, file=800 << 20), RECIPE, tmp_path) == 2
    with pytest.raises(ShardsError, match=r"megapixels in a file of 3,000 MB, got 2,048 MB"):
        fitting_workers(4, Load(pixels=1000, file=3_000_000_000), RECIPE, tmp_path)


@pytest.mark.parametrize("most", [0, 1])
@pytest.mark.parametrize("error", [BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), MemoryError()])
def test_processes_that_cannot_be_started(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, error: Exception
) -> None:
    """If some can be started, they build the dataset; if none, one line says why, without blaming the folder."""
    true, started = BaseProcess.start, [0]

    def start(process: BaseProcess) -> None:
        if started[0] == most:
            raise error
        started[0] += 1
        true(process)

    monkeypatch.setattr(BaseProcess, "start", start)
    notes: list[str] = []
    options: dict[str, Any] = {"images_per_shard": 1, "workers": 3, "note": notes.append}
    if most == 0:
        with pytest.raises(ShardsError, match=r"^expected 3 worker processes, got 0: .*; fewer --workers need less"):
            build(folder, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    else:
        build(folder, tmp_path / "out", **options)
        assert notes[0].startswith("expected 3 worker processes, got 1: ")
        assert digests(tmp_path / "out") == digests(build(folder, tmp_path / "undisturbed", images_per_shard=1))


def test_running_out_of_memory_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No image is skipped for it; finished shards stay."""
    true, calls = build_shard, [0]

    def short(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise MemoryError
        return true(*arguments)

    monkeypatch.setattr(pool, "build_shard", short)
    out, options = tmp_path / "out", {"images_per_shard": 1, "skip_bad": True}
    with pytest.raises(ShardsError, match=r"^memory is short: try fewer --workers\n2 of 5 shards are finished"):
        build(folder, out, **options)
    build(folder, out, **options)
    assert digests(out) == digests(build(folder, tmp_path / "undisturbed", images_per_shard=1))
