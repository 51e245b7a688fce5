"""Concurrent loaders, threads, forks and builds: every sample equals the slow path, every dataset is consistent."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Pixels, build, write_image
from torch.utils.data import DataLoader

from loader import FormatError, PatchDataset, PatchLoader
from loader.format.layout import HR
from loader.pixels.shards import Shards
from loader.pixels.tiles import transformed
from loader.resize.imresize import imresize

SECONDS = 90
LENGTH = 50


def slow_path(data: PatchDataset, pictures: dict[str, Pixels]) -> Callable[[int], tuple[Pixels, Pixels]]:
    """Return a function that returns sample g of the stream by slicing the images."""
    whole = {}
    for name, hr in pictures.items():
        cropped = hr[: hr.shape[0] // data.scale * data.scale, : hr.shape[1] // data.scale * data.scale]
        whole[name] = (imresize(cropped, data.scale), cropped)

    def sample(g: int) -> tuple[Pixels, Pixels]:
        epoch, n = divmod(g, len(data))
        crops = data.plan.crops(epoch, [n])
        sides = []
        for image, zoom in zip(whole[data.shards.index.name[int(crops.image[0])]], (1, data.scale), strict=True):
            top, left, side = int(crops.top[0]) * zoom, int(crops.left[0]) * zoom, data.lr_patch * zoom
            sides.append(transformed(image[top : top + side, left : left + side], int(crops.transform[0])))
        return sides[0], sides[1]

    return sample


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_concurrent_loaders_threads_and_forks(dataset: Path, pictures: dict[str, Pixels]) -> None:
    rng = random.Random(0)
    end, loaders, forks, samples = time.monotonic() + SECONDS, 0, 0, 0
    with ThreadPoolExecutor(4) as pool:
        while time.monotonic() < end:
            scale, patch = rng.choice([2, 3, 4]), rng.randrange(1, 17)
            data = PatchDataset(dataset, scale, patch, length=LENGTH, seed=rng.randrange(1 << 32))
            sample = slow_path(data, pictures)

            def read(options: dict[str, object], data: PatchDataset = data, sample: object = sample) -> int:
                loader = PatchLoader(data, **options)  # type: ignore[arg-type]
                g = first = int(str(options["start"]))
                for lr, hr in islice(loader, 12):
                    for one in zip(lr, hr, strict=True):
                        for found, wanted in zip(one, sample(g), strict=True):  # type: ignore[operator]
                            np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), wanted)
                        g += 1
                return g - first

            options = [
                {
                    "batch_size": rng.randrange(1, 12),
                    "start": rng.randrange(200),
                    "io": rng.choice(["mmap", "pread"]),
                    "threads": rng.randrange(1, 6),
                    "readahead": rng.randrange(0, 6),
                    "drop_pages": rng.random() < 0.3,
                }
                for _ in range(4)
            ]
            running = [pool.submit(read, each) for each in options]
            workers = torch.utils.data.DataLoader(data, 7, num_workers=2, multiprocessing_context="fork")
            for n, (lr, hr) in enumerate(pair for batch in workers for pair in zip(*batch, strict=True)):
                wanted = sample(n)
                np.testing.assert_array_equal(lr.permute(1, 2, 0).numpy(), wanted[0])
                np.testing.assert_array_equal(hr.permute(1, 2, 0).numpy(), wanted[1])
            samples += LENGTH + sum(future.result() for future in running)
            loaders, forks = loaders + 4, forks + 2
    print(f"{loaders} loaders, {forks} forked workers, {samples} samples compared in {SECONDS} s")
    assert loaders > 4


@pytest.mark.long
@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 8 worker processes:UserWarning")
def test_eight_workers(dataset: Path, pictures: dict[str, Pixels], start: str) -> None:
    data = PatchDataset(dataset, 4, 8, length=LENGTH * 16, seed=3)
    sample = slow_path(data, pictures)
    loader = DataLoader(data, 9, num_workers=8, persistent_workers=True, multiprocessing_context=start)
    for epoch in (0, 1):
        data.set_epoch(epoch)
        pairs = [pair for batch in loader for pair in zip(*batch, strict=True)]
        assert len(pairs) == len(data)
        for n, pair in enumerate(pairs):
            for found, wanted in zip(pair, sample(epoch * len(data) + n), strict=True):
                np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), wanted)
    print(f"8 workers by {start}, {dataset.name}: {2 * len(data)} samples compared")


def read_while_building(folder: Path, pictures: dict[str, Pixels], place: Path, seconds: float, builds: int) -> str:
    """Overwrite one dataset with another again and again while readers open it; return a summary."""
    for path in folder.iterdir():
        write_image(place / "others" / path.name, 255 - pictures[path.stem])
    counts, out, building = Counter[str](), place / "out", threading.Event()
    building.set()

    def read() -> None:
        while building.is_set():
            try:
                shards = Shards(out)
                found = [shards.read(image, HR) for image in range(len(shards.index.name))]
                tops = [shards.tiles(image, HR)[0, 0].copy() for image in range(len(found))]
            except FormatError:
                counts["refused"] += 1
                continue
            inverted = bool((found[0] != pictures[shards.index.name[0]]).any())
            for name, pixels, top in zip(shards.index.name, found, tops, strict=True):
                wanted = 255 - pictures[name] if inverted else pictures[name]
                np.testing.assert_array_equal(pixels, wanted)
                side = min(64, *wanted.shape[:2])
                np.testing.assert_array_equal(top[:side, :side], wanted[:side, :side])
            counts["inverted" if inverted else "plain"] += 1

    end = time.monotonic() + seconds
    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            while time.monotonic() < end or counts["builds"] < builds or not counts["inverted"] * counts["plain"]:
                source = (folder, place / "others")[counts["builds"] % 2]
                build(source, out, images_per_shard=1, overwrite=True)
                counts["builds"] += 1
                if any(reader.done() for reader in readers):
                    break
        finally:
            building.clear()
        for reader in readers:
            reader.result()
    whole = counts["plain"] + counts["inverted"]
    return f"{counts['builds']} builds, {whole} datasets read whole, {counts['refused']} refused"


def test_readers_during_builds(folder: Path, pictures: dict[str, Pixels], tmp_path: Path) -> None:
    read_while_building(folder, pictures, tmp_path, seconds=0, builds=4)


@pytest.mark.long
def test_readers_during_many_builds(folder: Path, pictures: dict[str, Pixels], tmp_path: Path) -> None:
    print("\n" + read_while_building(folder, pictures, tmp_path, seconds=60, builds=4))
