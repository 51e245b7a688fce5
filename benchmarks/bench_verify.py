"""`prep verify` compared with its limit: reading the files with cat, then computing the checksums.

python benchmarks/bench_verify.py [DATASET]     # default: mosaics of scikit-image's photographs at ×2 and ×4

All files are in the page cache. Each round times each task once; ratios are medians over rounds. The checksums alone
are computed over one block in the processor's cache, for as many bytes as the dataset has.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import hashlib
import statistics
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import click
from common import machine, make_mosaics, rounds, table

from loader.format.index import read_index
from loader.format.layout import Index
from prep.build.build import build_dataset
from prep.images.find import find_images
from prep.images.sample import sample_photographs
from prep.plan.dataset import default_images_per_shard, plan_dataset
from prep.plan.recipe import Recipe
from prep.shard.checksums import BLOCK
from prep.verify.verify import check_shards


@click.command()
@click.argument("dataset", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--mosaics", default=48, show_default=True, help="Images of 2040 × 1356, if no dataset is given.")
@click.option("--rounds", "count", default=9, show_default=True)
def main(dataset: Path | None, mosaics: int, count: int) -> None:
    """Time the verification of a DATASET."""
    with tempfile.TemporaryDirectory() as folder:
        measure(dataset or make_dataset(Path(folder), mosaics), count)


def make_dataset(folder: Path, mosaics: int) -> Path:
    """Build a dataset of mosaics of scikit-image's photographs."""
    (folder / "photographs").mkdir()
    for path in sample_photographs():
        (folder / "photographs" / path.name).symlink_to(path)
    make_mosaics(folder / "photographs", folder / "mosaics", mosaics)
    images = find_images([folder / "mosaics"])
    recipe = Recipe(
        scales=(2, 4), container="hdf5", tile=64, images_per_shard=default_images_per_shard(len(images)),
        resize="matlab-uint8", border="symmetric",
    )  # fmt: skip
    plan = plan_dataset(images, recipe, folder / "data")
    build_dataset(plan, os.cpu_count() or 1, skip_bad=False, overwrite=False, report=lambda done: None)
    return folder / "data"


def measure(folder: Path, count: int) -> None:
    """Print the table for one dataset."""
    index = read_index(folder)
    size = sum(shard.bytes for shard in index.shards)
    workers = sorted({1, len(os.sched_getaffinity(0))})
    works: dict[str, Callable[[], object]] = {}
    for n in workers:
        works[f"cat, {n}"] = partial(cat, [folder / shard.file for shard in index.shards], n)
        works[f"sha256, {n}"] = partial(checksum, lambda block: hashlib.sha256(block), size, n)
        works[f"crc32, {n}"] = partial(checksum, zlib.crc32, size, n)
        works[f"verify, {n}"] = partial(verify, folder, index, n)
    times = rounds(works, count)
    rows = []
    for n in workers:
        for work in ("cat", "sha256", "crc32", "verify"):
            rate = size / statistics.median(times[f"{work}, {n}"]) / 1e9
            rows.append([work, str(n), f"{rate:.2f}", *ratios(times, work, n)])
    print(
        f"{len(index.name)} images in {len(index.shards)} {index.container} shards, {size / 1e6:.0f} MB; {machine()}\n"
    )
    print(table(["work", "threads", "GB/s", "of cat + sha256", "of cat + sha256 + crc32"], rows))


def ratios(times: dict[str, list[float]], work: str, workers: int) -> list[str]:
    """Return the speed of verification relative to its parts run one after the other; blanks for other tasks."""
    if work != "verify":
        return ["", ""]
    cats, shas, crcs, whole = (times[f"{part}, {workers}"] for part in ("cat", "sha256", "crc32", "verify"))
    every = list(zip(cats, shas, crcs, whole, strict=True))
    without = statistics.median((cat + sha) / all_ for cat, sha, _, all_ in every)
    return [f"{without:.2f}", f"{statistics.median((cat + sha + crc) / all_ for cat, sha, crc, all_ in every):.2f}"]


def cat(files: list[Path], processes: int) -> None:
    """Read the files in several processes."""
    parts = [files[k::processes] for k in range(processes)]
    running = [subprocess.Popen(["cat", *map(str, part)], stdout=subprocess.DEVNULL) for part in parts if part]
    assert {process.wait() for process in running} == {0}


def checksum(function: Callable[[bytes], object], size: int, threads: int) -> None:
    """Compute a checksum over a number of bytes, in several threads."""
    block = bytes(BLOCK)

    def work() -> None:
        for _ in range(size // BLOCK // threads):
            function(block)

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work) for _ in range(threads)]:
            future.result()


def verify(folder: Path, index: Index, workers: int) -> None:
    """Verify as `prep verify` does."""
    assert not check_shards(folder, index, range(len(index.shards)), workers, False, lambda done: None)


if __name__ == "__main__":
    main()
