"""Disk space and memory are checked before a build starts."""

import os
import shutil
from pathlib import Path

import pytest
from helpers import Build, digests, make_recipe, photograph, write_image
from helpers import build as typed_build

import prep.build.resources
from loader.errors import ShardsError
from loader.format.index import read_index
from loader.system.free_memory import available_memory
from prep.build.memory import PROCESS, Load, fitting_workers
from prep.build.space import shard_bytes
from prep.images.decode import read_size
from prep.plan.recipe import Recipe

build: Build = typed_build
MB = 1 << 20


def recipe(**changes: object) -> Recipe:
    return make_recipe(**({"container": "raw"} | changes))


@pytest.mark.parametrize("container", ["hdf5", "raw"])
@pytest.mark.parametrize(
    ("count", "size", "tile"), [(1, (16, 16), 16), (60, (16, 20), 64), (60, (16, 20), 16), (3, (700, 900), 64)]
)
def test_the_estimated_size_is_a_close_upper_bound(
    container: str, count: int, size: tuple[int, int], tile: int, tmp_path: Path
) -> None:
    for i in range(count):
        write_image(tmp_path / "images" / f"{i}{'n' * 200}.png", photograph(*size))
    out = build(tmp_path / "images", tmp_path / "out", container=container, images_per_shard=count, tile=tile)
    (shard,) = read_index(out).shards
    whole = shard.bytes + (out / "index.json").stat().st_size
    estimate = shard_bytes([size] * count, recipe(container=container, tile=tile))
    assert whole <= estimate <= whole + 10_000 + 3 * count * 2048


def test_a_disk_with_too_little_space_is_refused_at_the_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [read_size(path) for path in sorted(folder.iterdir(), key=lambda path: path.stem)]
    needed = [shard_bytes([size], recipe()) for size in sizes]
    blocks = [0]

    def statvfs(_: object) -> os.statvfs_result:
        return os.statvfs_result((4096, 4096, 1000, 1000, *blocks, 0, 0, 0, 0, 255))

    monkeypatch.setattr(os, "statvfs", statvfs)
    out, one_each = tmp_path / "out", {"container": "raw", "images_per_shard": 1}
    blocks[0] = sum(needed) // 4096
    expected, got = sum(needed) / 1e6, blocks[0] * 4096 / 1e6
    with pytest.raises(
        ShardsError, match=f"expected {expected:.1f} MB of free space .*, got {got:.1f} MB; 0.1 MB more needed"
    ):
        build(folder, out, **one_each)
    assert not out.exists()

    def stop(done: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    blocks[0] += 1
    with pytest.raises(KeyboardInterrupt):
        build(folder, out, report=stop, **one_each)
    blocks[0] = sum(needed[2:]) // 4096  # two shards exist and need no more space; the others need one block more
    with pytest.raises(ShardsError, match=r"MB more needed\n2 of 5 shards are finished"):
        build(folder, out, **one_each)
    blocks[0] += 1
    build(folder, out, **one_each)
    monkeypatch.undo()
    assert digests(out) == digests(build(folder, tmp_path / "undisturbed", **one_each))


def machine(root: Path, free: int, groups: dict[str, str], files: dict[str, str]) -> Path:
    """Create a folder like the root of a machine with `free` MB of memory, its cgroups, and their files."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {free * 1024} kB\n")
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in groups))
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


VERSION_2 = {
    "job/memory.max": f"{900 * MB}\n",
    "job/memory.current": f"{500 * MB}\n",
    "job/memory.stat": f"anon 1\nactive_file {100 * MB}\ninactive_file {200 * MB}\n",
    "job/step/memory.max": "max\n",
    "job/step/memory.current": "5\n",
}
VERSION_1 = {
    "memory/memory.limit_in_bytes": "9223372036854771712\n",
    "memory/memory.usage_in_bytes": "5\n",
    "memory/job/memory.limit_in_bytes": f"{600 * MB}\n",
    "memory/job/memory.usage_in_bytes": f"{100 * MB}\n",
    "memory/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {20 * MB}\n",
}


@pytest.mark.parametrize(
    ("free", "group", "files", "expected"),
    [
        (1000, "0::/job/step", {}, 1000),
        (1000, "0::/job/step", VERSION_2, 700),
        (600, "0::/job/step", VERSION_2, 600),
        (1000, "5:memory:/job\n0::/", VERSION_1, 520),
        (1000, "5:cpu,memory:/elsewhere", VERSION_1, 1000),
        (1000, "5:cpu:/job", VERSION_1, 1000),
    ],
)
def test_available_memory_is_the_least_of_machine_and_cgroups(
    free: int, group: str, files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    assert available_memory(machine(tmp_path, free, {group: ""}, files)) == expected * MB


def test_unknown_memory_limits_nothing(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    assert fitting_workers(64, Load(pixels=1 << 40, file=0), recipe(), tmp_path) == 64
    assert available_memory() is not None


def test_fewer_workers_if_memory_is_short(tmp_path: Path) -> None:
    root = machine(tmp_path, 1000, {}, {})
    each = (1000 * MB // 3 - PROCESS) // 20  # pixels of an image of which three fit
    assert fitting_workers(2, Load(pixels=each, file=0), recipe(), root) == 2
    assert fitting_workers(8, Load(pixels=each, file=0), recipe(), root) == 3
    assert fitting_workers(8, Load(pixels=each + 1, file=0), recipe(), root) == 2
    assert fitting_workers(8, Load(pixels=each, file=0), recipe(given_lr=True, resize="matlab-double"), root) == 3
    with pytest.raises(
        ShardsError, match=r"expected [\d,]+ MB of memory for the largest image, of [\d.]+ megap.*, got 734"
    ):
        fitting_workers(
            8, Load(pixels=each, file=0), recipe(resize="matlab-double"), machine(tmp_path / "small", 700, {}, {})
        )


def test_a_build_starts_as_many_workers_as_fit_into_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, Load]] = []

    def fitting(workers: int, largest: Load, recipe: Recipe) -> int:
        asked.append((workers, largest))
        return 1

    monkeypatch.setattr(prep.build.resources, "fitting_workers", fitting)
    notes: list[str] = []
    build(folder, tmp_path / "out", workers=8, note=notes.append)
    assert asked == [(3, Load(pixels=128 * 192, file=(folder / "a.png").stat().st_size))]
    assert notes == ["memory for 1 of 3 workers: the largest image has 0.0 megapixels"]


def test_an_image_with_too_many_pixels_is_refused_before_decoding(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = shutil.copytree(folder, tmp_path / "images")
    write_image(Path(images) / "big.png", photograph(200, 200))
    data = (Path(images) / "big.png").read_bytes()
    (Path(images) / "big.png").write_bytes(data[: len(data) // 2])  # decoding would find it truncated
    with pytest.raises(ShardsError, match=r"big.png: expected at most 30000 pixels, got 200 × 200"):
        build(images, tmp_path / "out", max_pixels=30_000)
    with pytest.raises(ShardsError, match=r"big.png: expected a complete image"):
        build(images, tmp_path / "out", max_pixels=40_000)


@pytest.mark.long
def test_300_megapixels(tmp_path: Path) -> None:
    """With the limit raised, a build in its own process stays within the estimated memory."""
    import resource
    import subprocess
    import sys

    import cv2
    import numpy as np

    coarse = np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)
    (tmp_path / "in").mkdir()
    assert cv2.imwrite(str(tmp_path / "in/big.png"), cv2.resize(coarse, (20_000, 15_000)))
    code = "from prep.cli import main; main()"
    words = [sys.executable, "-c", code, "build-shards", "in", "--scale", "4", "--workers", "1", "--out", "out"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*words, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    refused = run()
    assert refused.returncode == 1
    assert "big.png: expected at most 268435456 pixels, got 15000 × 20000" in refused.stderr
    done = run("--max-pixels", "300_000_000")
    assert done.returncode == 0, done.stderr
    assert read_index(tmp_path / "out").sizes(4)[1].tolist() == [5000]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"\npeak: {peak / 1e6:.0f} MB, estimated: {(PROCESS + 3e8 * 20) / 1e6:.0f} MB")
    assert peak < PROCESS + 3e8 * 20
