"""Patches per second out of files in the page cache: ours, rivals, and memcpy of the same bytes, in one process.

python benchmarks/bench_loader.py --images DIR [--mosaics 48] [--work DIR]

DIR holds large photographs; with --mosaics, that many images of 2040 × 1356 are first made of the photographs in it.
Crops are not transformed and batches not collated. Each round times every way on batches of its own length; figures
are medians over rounds. One thread for everything.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import cv2
import torch
from common import machine, make_mosaics, rounds, table
from rivals import Read, h5py_slices, memcpy, ours, places, png

from loader import PatchDataset
from loader import tiles as tiles_module
from prep.build import build_dataset, images_per_shard, plan_shards
from prep.images import find_images
from prep.shard import Recipe

# Samples that each way reads in a round: enough to time, few enough to wait for.
SAMPLES = {"memcpy": 2560, "ours": 2560, "ours, fallback": 1280, "h5py slices": 640, "PNG decoding": 4}


@click.command()
@click.option("--images", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--mosaics", type=int, help="Make this many 2040 × 1356 images of those in the folder.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep images and shards here.  [default: removed]")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--lr-patch", default=64, show_default=True)
@click.option("--rounds", "count", default=9, show_default=True)
def main(images: Path, mosaics: int | None, work: Path | None, batch_size: int, lr_patch: int, count: int) -> None:
    """Measure warm throughput at ×4 and ×2."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = work or Path(temporary)
        if mosaics:
            make_mosaics(images, work / "images", mosaics)
            images = work / "images"
        shards = work / "shards"
        if not shards.exists():
            build(images, shards)
        print(f"{len(find_images([images]))} images, batch {batch_size}; {machine()}")
        for scale in (4, 2):
            data = PatchDataset(shards, scale, lr_patch, length=1 << 20, augment=False, too_small="skip")
            measure(data, batch_size, count, work / "png")


def build(images: Path, shards: Path) -> None:
    """A dataset at ×2 and ×4 with the defaults of `prep build-shards`."""
    files = find_images([images])
    recipe = Recipe((2, 4), "hdf5", 64, images_per_shard(len(files)), "matlab-uint8", "symmetric")
    plans = plan_shards(files, recipe, shards)
    build_dataset(plans, os.cpu_count() or 1, skip_bad=False, overwrite=False, report=lambda done: None)


def measure(data: PatchDataset, batch_size: int, count: int, work: Path) -> None:
    """Print the table for one scale."""
    crops = places(data, max(SAMPLES.values()))
    reads = {
        "memcpy": memcpy(data, crops),
        "ours": ours(data),
        "ours, fallback": ours(data),
        "h5py slices": h5py_slices(data, crops),
        "PNG decoding": png(data, crops, work),
    }
    kernel = tiles_module.kernel
    if kernel is None:
        del reads["ours"]

    def work_of(name: str, read: Read) -> Callable[[], None]:
        def run() -> None:
            tiles_module.kernel = None if "fallback" in name else kernel
            for start in range(0, SAMPLES[name], batch_size):
                read(range(start, min(start + batch_size, SAMPLES[name])))

        return run

    times = rounds({name: work_of(name, read) for name, read in reads.items()}, count)
    rates = {name: [SAMPLES[name] / seconds for seconds in each] for name, each in times.items()}
    rows = [
        [
            name,
            f"{statistics.median(rate):,.0f}",
            f"{statistics.median(a / b for a, b in zip(rate, rates['memcpy'], strict=True)):.2f}",
            f"{statistics.median(a / b for a, b in zip(rate, rates['PNG decoding'], strict=True)):,.0f}",
        ]
        for name, rate in rates.items()
    ]
    side = data.lr_patch * data.scale
    print(f"\n×{data.scale}, LR {data.lr_patch} × {data.lr_patch}, HR {side} × {side}\n")
    print(table(["warm", "patches/s", "of memcpy", "× PNG"], rows))


if __name__ == "__main__":
    main()
