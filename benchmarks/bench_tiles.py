"""Choosing tile sizes: rates and bytes of crops of 64 / 256 (×4) and 64 / 128 (×2), for several tile sizes.

python benchmarks/bench_tiles.py --images DIR --mosaics 32 --work WORK

Warm: the gather alone, one thread, no transforms, as a ratio to tiles of 64 (LR 32) in the same round. Cold:
PatchLoader after dropping the shards from the page cache. Bytes: whole pages touched by crops ÷ bytes needed. Advised:
page ranges requested by page advice; reads: positional reads; both per patch.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import click
import numpy as np
import torch
from common import machine, make_mosaics, rounds, seconds_of, table
from storage import files_in, forget

from loader import PatchDataset, PatchLoader
from loader.ahead.footprint import PatchSize, footprint
from loader.ahead.reader import open_reader
from loader.format import layout as fmt
from loader.format.layout import HR
from loader.pixels.byte_ranges import pages
from prep.build.build import build_dataset
from prep.images.find import find_images
from prep.plan.dataset import default_images_per_shard, plan_dataset
from prep.plan.recipe import Recipe

TILES = ((32, 32), (48, 32), (64, 32), (64, 64), (96, 48), (128, 64))  # HR, LR
DEFAULT = (64, 32)
BATCH, PATCH, WARM_BATCHES, COLD_BATCHES = 64, 64, 10, 6


@click.command()
@click.option("--images", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--mosaics", type=int, help="Assemble this many 2040 × 1356 images from those in the folder.")
@click.option(
    "--work", type=click.Path(path_type=Path), help="Folder for images and shards, kept.  [default: a temporary folder]"
)
@click.option("--rounds", "count", default=7, show_default=True)
def main(images: Path, mosaics: int | None, work: Path | None, count: int) -> None:
    """Compare tile sizes."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = work or Path(temporary)
        if mosaics:
            make_mosaics(images, work / "images", mosaics)
            images = work / "images"
        folders = {tiles: build(images, work, *tiles) for tiles in TILES}
        print(f"{len(find_images([images]))} images; {machine()}")
        for scale in (4, 2):
            rows = measure(folders, scale, count)
            print(f"\n×{scale}\n")
            print(table(["tiles HR / LR", "warm", "cold, patches/s", "bytes", "advised", "reads"], rows))


def build(images: Path, work: Path, hr_tile: int, lr_tile: int) -> Path:
    """Return a dataset at ×2 and ×4 with these tile sizes, built if it does not exist."""
    folder = work / f"tiles-{hr_tile}-{lr_tile}"
    if not (folder / fmt.INDEX).exists():
        files = find_images([images])
        recipe = Recipe(
        scales=(2, 4), container="raw", tile=hr_tile, images_per_shard=default_images_per_shard(len(files)),
        resize="matlab-uint8", border="symmetric",
    )  # fmt: skip
        rule = fmt.plane_tile
        fmt.plane_tile = lambda tile, level: tile if level == HR else lr_tile
        try:
            plan = plan_dataset(files, recipe, folder)
            build_dataset(plan, 1, skip_bad=False, overwrite=False, report=lambda done: None)
        finally:
            fmt.plane_tile = rule
    return folder


def measure(folders: dict[tuple[int, int], Path], scale: int, count: int) -> list[list[str]]:
    """Return a table row for each tile size."""
    sets = {tiles: PatchDataset(folder, scale, PATCH, augment=False) for tiles, folder in folders.items()}
    times = rounds({str(tiles): gather_work(data) for tiles, data in sets.items()}, count)
    cold: dict[tuple[int, int], list[float]] = {tiles: [] for tiles in sets}
    del sets
    for number in range(max(count // 2, 1)):
        for tiles, folder in folders.items():
            forget(files_in(folder))
            data = PatchDataset(folder, scale, PATCH, seed=number)
            batches = iter(PatchLoader(data, BATCH, io="mmap"))
            cold[tiles].append(COLD_BATCHES * BATCH / seconds_of(partial(take, batches)))
            batches.close()
            del data, batches
    rows = []
    for tiles, folder in folders.items():
        shares = [a / b for a, b in zip(times[str(DEFAULT)], times[str(tiles)], strict=True)]
        data = PatchDataset(folder, scale, PATCH)
        crops = data.plan.crops(0, np.arange(4096))
        asked = pages(footprint(data.shards.index, PatchSize(scale, PATCH).in_planes(crops)))
        needed = 4096 * (PATCH**2 + (PATCH * scale) ** 2) * 3
        reader = open_reader(data.shards, scale, PATCH, "pread")
        for start in range(0, 512, BATCH):
            reader.ask(data.plan.crops(0, np.arange(start, start + BATCH)))
        reader.close()
        rows.append(
            [
                f"{tiles[0]} / {tiles[1]}",
                f"{statistics.median(shares):.2f}",
                f"{statistics.median(cold[tiles]):,.0f}",
                f"{asked.bytes / needed:.2f}",
                f"{len(asked) / 4096:.1f}",
                f"{reader.counts.requests / 512:.1f}",
            ]
        )
    return rows


def take(batches: Iterator[object]) -> None:
    """Read some batches."""
    for _ in islice(batches, COLD_BATCHES):
        pass


def gather_work(data: PatchDataset) -> Callable[[], None]:
    """Gather some batches of both planes into reused buffers."""
    patch = PatchSize(data.scale, PATCH)
    out = {side: torch.empty(BATCH, side, side, 3, dtype=torch.uint8).numpy() for side in (patch.lr, patch.hr)}
    crops = [patch.in_planes(data.plan.crops(0, np.arange(BATCH) + BATCH * step)) for step in range(WARM_BATCHES)]

    def work() -> None:
        for batch in crops:
            for plane in batch:
                data.shards.gather(plane, out[plane.side])

    return work


if __name__ == "__main__":
    main()
