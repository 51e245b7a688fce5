"""A dataset of 100,000 images: how soon it gives its first batch, how fast it goes on, and what memory a worker takes.

python benchmarks/bench_index.py [--images 100000] [--work DIR]

The shards are sparse: they have the size of 2040 × 1356 images and hold nothing, so that the index is real and the
disk stays empty. Throughput is that of the same number of crops once their pages are in memory, compared in turns with
a dataset of 100 such images. Memory is that of a worker of torch's DataLoader, spawned as a process of its own, beyond
that of a process that only imports torch; pages of the mapped shards belong to the page cache and are left out.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import click
import numpy as np
from common import machine, median_ratio, rounds
from report import write_targets

from loader import PatchDataset, PatchLoader
from loader.format.index_text import dump_index
from loader.format.layout import HR, PAGE, Index, LrOrigin, Plane, Shard, Strings, plane_tile, run_length, shard_file

HEIGHT, WIDTH, SCALE, TILE, PER_SHARD = 1356, 2040, 4, 64, 64
SAMPLES = 2048  # in the epochs of which throughput is measured
HERE = Path(__file__).parent


@click.command()
@click.option("--images", "count", default=100_000, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--rounds", "repeats", default=7, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Keep the datasets here.  [default: a temporary folder]")
@click.option("--out", default=HERE / "results", type=click.Path(path_type=Path))
def main(count: int, batch_size: int, repeats: int, work: Path | None, out: Path) -> None:
    """Measure, and write index.json beside the other results."""
    with nullcontext(work) if work else tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder, f"images-{count}"), Path(folder, "images-100")
        for path, images in ((large, count), (small, 100)):
            if not path.exists():
                write_sparse(path, images)
        figures = {
            "machine": machine(),
            "images": count,
            "index_mb": round((large / "index.json").stat().st_size / 1e6, 1),
            "first_batch_s": round(statistics.median(first_batch(large, batch_size) for _ in range(3)), 3),
            "throughput_ratio": round(throughput(large, small, batch_size, repeats), 3),
            **worker_memory(large, batch_size),
        }
    out.mkdir(parents=True, exist_ok=True)
    (out / "index.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for key, value in figures.items():
        print(f"{key}: {value}")
    print(f"\n{write_targets(out)}")


def write_sparse(folder: Path, count: int) -> None:
    """A dataset at ×4 whose shards are holes."""
    shapes = {HR: (HEIGHT, WIDTH), SCALE: (HEIGHT // SCALE, WIDTH // SCALE)}
    tiles = {scale: plane_tile(TILE, scale) for scale in shapes}
    sizes = {level: run_length(*shape, tiles[level]) for level, shape in shapes.items()}
    aligned = {scale: -(-size // PAGE) * PAGE for scale, size in sizes.items()}
    number, place = np.arange(count), np.arange(count) % PER_SHARD
    start = place * sum(aligned.values())
    name = [f"{i:06d}" for i in range(count)]
    digest = ["0" * 64] * count
    zeros = np.zeros(count, np.int64)
    planes = {
        HR: Plane(tiles[HR], start, zeros, Strings([f"{stem}.png" for stem in name]), Strings(digest)),
        SCALE: Plane(tiles[SCALE], start + aligned[HR], zeros, None, None),
    }
    in_shard = np.bincount(number // PER_SHARD).tolist()
    shards = tuple(
        Shard(shard_file(i, "raw"), images * sum(aligned.values()), "0" * 64) for i, images in enumerate(in_shard)
    )
    height, width = np.full(count, HEIGHT), np.full(count, WIDTH)
    origin = LrOrigin("imresize", "matlab-uint8", "symmetric")
    index = Index(
        container="raw",
        made_by="bench_index",
        libraries={},
        lr=origin,
        images_per_shard=PER_SHARD,
        shards=shards,
        name=Strings(name),
        shard=number // PER_SHARD,
        height=height,
        width=width,
        planes=planes,
    )
    folder.mkdir(parents=True)
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.truncate(shard.bytes)
    (folder / "index.json").write_bytes(dump_index(index))


def first_batch(folder: Path, batch_size: int) -> float:
    """Seconds from opening a dataset to the first batch."""
    start = time.perf_counter()
    next(iter(PatchLoader(PatchDataset(folder, SCALE), batch_size)))
    return time.perf_counter() - start


def throughput(large: Path, small: Path, batch_size: int, repeats: int) -> float:
    """How fast the larger dataset is read, by how fast the smaller one is."""

    def work(folder: Path) -> Iterator[int]:
        loader = PatchLoader(PatchDataset(folder, SCALE, length=SAMPLES), batch_size, epochs=1)
        while True:
            yield sum(len(lr) for lr, _ in loader)

    works = {name: partial(next, work(path)) for name, path in (("large", large), ("small", small))}
    times = rounds(works, repeats)
    return median_ratio(times["small"], times["large"])


def worker_memory(folder: Path, batch_size: int) -> dict[str, float]:
    """What worker_memory.py tells."""
    command = [sys.executable, str(HERE / "worker_memory.py"), str(folder), str(batch_size)]
    told: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return told


if __name__ == "__main__":
    main()
