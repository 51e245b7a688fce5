"""PatchLoader returns the samples of its dataset, however it is read, split over ranks, resumed or kept."""

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Pixels, build, photograph, write_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loader import FormatError, PatchDataset, PatchLoader, ShardsError, to_float
from loader.pixels import tiles as tiles_module
from loader.pixels.tiles import transformed
from loader.resize.imresize import imresize


def content(pairs: Any) -> list[tuple[bytes, bytes]]:
    """Return the bytes of batches, or of single samples, one entry per sample."""
    samples: list[Any] = []
    for lr, hr in pairs:
        for one in zip(*((part if part.dim() == 4 else part[None]) for part in (lr, hr)), strict=True):
            samples.append(tuple(side.permute(1, 2, 0).contiguous().numpy().tobytes() for side in one))
    return samples


def expected(data: PatchDataset, first: int, last: int) -> list[tuple[bytes, bytes]]:
    """Return samples of the stream, read through the dataset."""
    samples = []
    for g in range(first, last):
        epoch, n = divmod(g, len(data))
        data.set_epoch(epoch)
        samples += content([data[n]])
    return samples


@pytest.mark.parametrize("kernel", ["compiled", "fallback"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scale=st.sampled_from([2, 3, 4]),
    patch=st.integers(1, 16),
    length=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    world_size=st.sampled_from([1, 2, 3, 8]),
    start=st.integers(0, 70),
    io=st.sampled_from(["mmap", "pread"]),
    readahead=st.sampled_from([0, 1, 5]),
    threads=st.integers(1, 3),
    augment=st.booleans(),
    drop_pages=st.booleans(),
)
def test_stream_is_independent_of_loader_options(
    kernel: str,
    dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    scale: int,
    patch: int,
    length: int,
    batch_size: int,
    world_size: int,
    start: int,
    augment: bool,
    **reading: Any,
) -> None:
    if kernel == "fallback":
        monkeypatch.setattr(tiles_module, "gather_kernel", None)
    data = PatchDataset(dataset, scale, patch, length=length, seed=9, augment=augment, too_small="skip")
    ranks = [
        islice(PatchLoader(data, batch_size, rank=rank, world_size=world_size, start=start, **reading), 3)
        for rank in range(world_size)
    ]
    found = [sample for step in zip(*ranks, strict=True) for sample in content(step)]
    assert found == expected(data, start, start + 3 * batch_size * world_size)


def test_batches_equal_slow_path(dataset: Path, pictures: dict[str, Pixels]) -> None:
    """Compare with decoding, cropping, shrinking, slicing and transforming by hand."""
    data = PatchDataset(dataset, 4, 11, length=30, seed=2)
    batch = next(iter(PatchLoader(data, 30)))
    for n in range(30):
        crop = data.crop(n)
        hr = pictures[crop.image]
        hr = hr[: hr.shape[0] // 4 * 4, : hr.shape[1] // 4 * 4]
        for part, image, zoom in ((batch[0], imresize(hr, 4), 1), (batch[1], hr, 4)):
            top, left, side = crop.top * zoom, crop.left * zoom, 11 * zoom
            wanted = transformed(image[top : top + side, left : left + side], crop.transform)
            np.testing.assert_array_equal(part[n].permute(1, 2, 0).numpy(), wanted)


def test_batches_are_channels_last_bytes(dataset: Path) -> None:
    lr, hr = next(iter(PatchLoader(PatchDataset(dataset, 4, 8), 3)))
    assert lr.shape == (3, 3, 8, 8)
    assert hr.shape == (3, 3, 32, 32)
    assert lr.dtype == hr.dtype == torch.uint8
    assert hr.is_contiguous(memory_format=torch.channels_last)
    floats = to_float((lr, hr), "cpu")
    assert floats[1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(floats[0], lr.float() / 255)


@pytest.mark.parametrize(("world_size", "sizes"), [(1, [8, 8, 8, 1]), (2, [8, 4]), (3, [8]), (8, [3])])
def test_epochs_end_together_on_all_ranks(dataset: Path, world_size: int, sizes: list[int]) -> None:
    data = PatchDataset(dataset, 4, 8, length=25)
    for rank in range(world_size):
        loader = PatchLoader(data, 8, rank=rank, world_size=world_size, epochs=1)
        assert [len(lr) for lr, _ in loader] == sizes
        assert len(loader) == len(sizes)
    steps = zip(
        *(PatchLoader(data, 8, rank=r, world_size=world_size, epochs=1) for r in range(world_size)), strict=True
    )
    total = sum(sizes) * world_size
    assert [sample for step in steps for sample in content(step)] == expected(data, 0, total)
    assert 25 - total < world_size


def test_epochs_count_from_stream_start(dataset: Path) -> None:
    data = PatchDataset(dataset, 4, 8, length=25)
    assert [len(lr) for lr, _ in PatchLoader(data, 10, epochs=2, start=15)] == [10, 10, 10, 5]
    assert list(PatchLoader(data, 10, epochs=2, start=50)) == []
    with pytest.raises(TypeError, match="without epochs has no length"):
        len(PatchLoader(data, 10))


def test_resume_at_another_world_size(dataset: Path) -> None:
    data = PatchDataset(dataset, 4, 8, length=25, seed=1)
    ranks = [PatchLoader(data, 4, rank=rank, world_size=2) for rank in range(2)]
    iterators = [iter(loader) for loader in ranks]
    steps = [[next(iterator) for iterator in iterators] for _ in range(5)]
    found = [sample for step in steps for sample in content(step)]
    states = [loader.state_dict() for loader in ranks]
    stream = {"length": 25, "seed": 1, "scale": 4, "lr_patch": 8, "augment": True}
    assert states[0] == states[1] == {"sample": 40, "datasets": [data.shards.identity(4)]} | stream
    one = PatchLoader(data, 7)
    one.load_state_dict(states[0])
    found += content(islice(one, 3))
    assert found == expected(data, 0, 61)
    with pytest.raises(ShardsError, match="seed: expected 2, got 1"):
        PatchLoader(PatchDataset(dataset, 4, 8, length=25, seed=2), 4).load_state_dict(states[0])
    with pytest.raises(ShardsError, match="length: expected 26, got 25"):
        PatchLoader(PatchDataset(dataset, 4, 8, length=26, seed=1), 4).load_state_dict(states[0])


@pytest.mark.parametrize("hold", ["batch", "slice", "numpy", "half"])
def test_kept_batches_do_not_change(dataset: Path, hold: str) -> None:
    data = PatchDataset(dataset, 4, 8, length=25)
    keep: dict[str, Callable[[Any, Any], Any]] = {
        "batch": lambda lr, hr: hr,
        "slice": lambda lr, hr: hr[2:3, 1],
        "numpy": lambda lr, hr: hr.numpy()[1],
        "half": lambda lr, hr: hr if torch.rand(1) < 0.5 else hr.clone(),
    }
    held, copies = [], []
    for lr, hr in islice(PatchLoader(data, 5), 60):
        held.append(keep[hold](lr, hr))
        copies.append(torch.as_tensor(held[-1]).clone())
    for kept, copy in zip(held, copies, strict=True):
        assert torch.equal(torch.as_tensor(kept), copy)


def test_memory_is_reused(dataset: Path) -> None:
    data = PatchDataset(dataset, 4, 8, length=25)
    seen = {hr.data_ptr() for _, hr in islice(PatchLoader(data, 5), 200)}
    assert len(seen) < 20


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for a condition: dropping an iterator stops its threads without waiting for them."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("srshards")]


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_dropping_iterator_stops_threads(dataset: Path, io: Any) -> None:
    files = len(list(Path("/proc/self/fd").iterdir()))
    iterator = iter(PatchLoader(PatchDataset(dataset, 4, 8), 5, io=io, drop_pages=True))
    next(iterator)
    assert threads()
    del iterator
    gc.collect()
    wait_for(lambda: not threads())
    assert len(list(Path("/proc/self/fd").iterdir())) <= files + 2  # two shards may stay open
    list(PatchLoader(PatchDataset(dataset, 4, 8), 5, io=io, epochs=1))
    assert not threads()


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_interpreter_exits_with_open_iterator(dataset: Path, io: str) -> None:
    code = (
        "from loader import PatchDataset, PatchLoader\n"
        f"iterator = iter(PatchLoader(PatchDataset({str(dataset)!r}, 4, 8), 5, io={io!r}))\n"
        "print(next(iterator)[1].shape)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "torch.Size([5, 3, 32, 32])\n"
    assert not run.stderr


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_concurrent_iterators_and_forks(dataset: Path) -> None:
    """Gathering threads and forked workers see the same stream."""
    data = PatchDataset(dataset, 4, 8, length=40, seed=4)
    want = expected(data, 0, 40)
    data.set_epoch(0)
    loaders = [PatchLoader(data, 8, io=io, threads=3) for io in ("mmap", "pread", "mmap")]
    running = [iter(loader) for loader in loaders]
    first = [next(iterator) for iterator in running]
    workers = torch.utils.data.DataLoader(data, 10, num_workers=2, multiprocessing_context="fork")
    assert content(workers) == want
    for iterator, batch in zip(running, first, strict=True):
        assert content([batch, *islice(iterator, 4)]) == want


def test_stats(dataset: Path) -> None:
    loader = PatchLoader(PatchDataset(dataset, 4, 8), 5, epochs=1)
    given = len(list(loader))
    stats = loader.stats()
    assert stats.batches == given == len(loader)
    assert stats.waited > 0
    assert stats.requests > given
    assert stats.bytes_asked >= stats.requests * 4096


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_worker_errors_propagate(tmp_path: Path, io: Any) -> None:
    write_image(tmp_path / "in/a.png", photograph(64, 64))
    data = PatchDataset(build(tmp_path / "in", tmp_path / "out"), 4, 8)
    shard = tmp_path / "out" / data.shards.index.shards[0].file
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FormatError, match="length: expected"):
        next(iter(PatchLoader(data, 5, io=io)))
    assert not threads()


def test_file_truncated_during_reads(tmp_path: Path) -> None:
    """Positional reads report an error; for mapped files see FORMAT.md."""
    write_image(tmp_path / "in/a.png", photograph(640, 640))
    data = PatchDataset(build(tmp_path / "in", tmp_path / "out"), 4, 8)
    iterator = iter(PatchLoader(data, 5, io="pread", readahead=1))
    next(iterator)
    shard = tmp_path / "out" / data.shards.index.shards[0].file
    os.truncate(shard, 4096)
    with pytest.raises(FormatError, match=r"shard-00000.h5: expected bytes \d+ to \d+, got end of file at \d+"):
        list(islice(iterator, 50))


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 0},
        {"rank": 1},
        {"rank": -1},
        {"start": -1},
        {"epochs": 0},
        {"io": "aio"},
        {"readahead": -1},
        {"threads": 0},
    ],
)
def test_wrong_arguments(dataset: Path, change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=f"{name}: expected .*, got"):
        PatchLoader(PatchDataset(dataset, 4, 8), **({"batch_size": 4} | change))
