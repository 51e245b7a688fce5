"""Minutes of loaders, threads and forked workers at once, on one dataset, every sample compared with the slow path."""

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Pixels

from loader import PatchDataset, PatchLoader
from loader.tiles import transformed
from prep.imresize import imresize

SECONDS = 90
LENGTH = 50


def slow_path(data: PatchDataset, pictures: dict[str, Pixels]) -> Callable[[int], tuple[Pixels, Pixels]]:
    """A function that gives global sample g by slicing the images."""
    whole = {}
    for name, hr in pictures.items():
        cropped = hr[: hr.shape[0] // data.scale * data.scale, : hr.shape[1] // data.scale * data.scale]
        whole[name] = (imresize(cropped, data.scale), cropped)

    def sample(g: int) -> tuple[Pixels, Pixels]:
        epoch, n = divmod(g, LENGTH)
        crops = data.plan.crops(epoch, [n])
        sides = []
        for image, zoom in zip(whole[data.shards.index.name[int(crops.image[0])]], (1, data.scale), strict=True):
            top, left, side = int(crops.top[0]) * zoom, int(crops.left[0]) * zoom, data.lr_patch * zoom
            sides.append(transformed(image[top : top + side, left : left + side], int(crops.transform[0])))
        return sides[0], sides[1]

    return sample


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_many_loaders_threads_and_forks(dataset: Path, pictures: dict[str, Pixels]) -> None:
    rng = random.Random(0)
    end, loaders, forks, samples = time.monotonic() + SECONDS, 0, 0, 0
    with ThreadPoolExecutor(4) as pool:
        while time.monotonic() < end:
            scale, patch = rng.choice([2, 3, 4]), rng.randrange(1, 17)
            data = PatchDataset(dataset, scale, patch, length=LENGTH, seed=rng.randrange(1 << 32))
            sample = slow_path(data, pictures)

            def read(options: dict[str, object], data: PatchDataset = data, sample: object = sample) -> int:
                loader = PatchLoader(data, **options)  # type: ignore[arg-type]
                g = loader.start
                for lr, hr in islice(loader, 12):
                    for one in zip(lr, hr, strict=True):
                        for found, wanted in zip(one, sample(g), strict=True):  # type: ignore[operator]
                            np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), wanted)
                        g += 1
                return g - loader.start

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
