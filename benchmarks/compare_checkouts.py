"""Two checkouts side by side: is a change neutral for speed?

python benchmarks/compare_checkouts.py OLD [NEW]     # NEW: this one; build the kernels of both first

Every measurement runs in a process of its own that imports one checkout, through documented names only. Rounds
alternate the order of the two; ratios are taken within a round, since machines speed up and slow down.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import cv2
from common import machine, median_ratio, mosaic, table, versions

from prep.images.decode import read_image
from prep.images.sample import sample_photographs

READ = """
import sys, time
from loader import PatchDataset, PatchLoader
batches = iter(PatchLoader(PatchDataset({shards!r}, 4, lr_patch=48), 16, threads=2, io={io!r}))
for _ in range(20): next(batches)
start, count = time.perf_counter(), 0
while time.perf_counter() - start < {seconds}: next(batches); count += 1
print((time.perf_counter() - start) / count)
"""
ITEMS = """
import time
from loader import PatchDataset
data = PatchDataset({shards!r}, 4, lr_patch=48, length=4096, fixed=True)
data[0]
start, count = time.perf_counter(), 0
while time.perf_counter() - start < {seconds}: data[count % 4096]; count += 1
print((time.perf_counter() - start) / count)
"""
STEP = """
import time, torch
from model.shufflemixer import ShuffleMixer
torch.manual_seed(0)
network, batch = ShuffleMixer(64, 7, 5, 2, 4), torch.rand(4, 3, 48, 48).to(memory_format=torch.channels_last)
def step():
    network.zero_grad()
    network(batch).mean().backward()
step()
start, count = time.perf_counter(), 0
while time.perf_counter() - start < {seconds}: step(); count += 1
print((time.perf_counter() - start) / count)
"""
BUILD = """
import shutil, sys, time
from prep.cli import main
words = ["build-shards", {images!r}, "--scale", "2", "--scale", "4", "--workers", "1", "--out", {shards!r}]
shutil.rmtree({shards!r}, ignore_errors=True)
start = time.perf_counter()
main(words, standalone_mode=False)
print(time.perf_counter() - start)
"""
NO_KERNELS = {"SRSHARDS_KERNELS": "0"}


@click.command()
@click.argument("old", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, file_okay=False, path_type=Path), default=Path(__file__).parents[1])
@click.option("--rounds", default=7, show_default=True)
@click.option("--seconds", default=2.0, show_default=True, help="Of each measurement.")
@click.option("--images", default=8, show_default=True, help="Images of 2040 × 1356 in the dataset.")
def main(old: Path, new: Path, rounds: int, seconds: float, images: int) -> None:
    """Print how long NEW takes compared with OLD: loading, building and a training step."""
    works: dict[str, tuple[str, dict[str, str]]] = {
        f"building {images} images": (BUILD, {}),  # first: the others read what it leaves
        "a batch of 16, mapped": (READ.replace("{io!r}", "'mmap'"), {}),
        "a batch of 16, positional reads": (READ.replace("{io!r}", "'pread'"), {}),
        "a batch of 16, mapped, no kernels": (READ.replace("{io!r}", "'mmap'"), NO_KERNELS),
        "a single crop": (ITEMS, {}),
        "a training step, tiny ×4": (STEP, {}),
        "a training step, tiny ×4, no kernels": (STEP, NO_KERNELS),
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder, "images")
        write_mosaics(sources, images)
        for name, (code, environment) in works.items():
            times: dict[str, list[float]] = {"old": [], "new": []}
            for number in range(rounds):
                for label in ("old", "new") if number % 2 == 0 else ("new", "old"):
                    facts = {"images": str(sources), "shards": str(Path(folder, label)), "seconds": seconds}
                    times[label].append(run({"old": old, "new": new}[label], code, environment, facts))
            ratios = sorted(b / a for a, b in zip(times["old"], times["new"], strict=True))
            medians = [f"{1000 * statistics.median(each):.3g}" for each in times.values()]
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            rows.append([name, *medians, f"{median_ratio(times['new'], times['old']):.2f}", spread])
    print(table(["work", "old, ms", "new, ms", "new ÷ old", "rounds"], rows))
    print(f"{rounds} rounds; {machine()}; {versions()}")


def write_mosaics(folder: Path, count: int) -> None:
    """Write images of DIV2K's size, made of scikit-image's photographs."""
    photographs = [read_image(path) for path in sample_photographs()]
    folder.mkdir()
    for number in range(count):
        cv2.imwrite(str(folder / f"{number:04d}.png"), mosaic(photographs, 1356, 2040, number)[..., ::-1])


def run(checkout: Path, code: str, environment: dict[str, str], facts: dict[str, object]) -> float:
    """Return the seconds that code prints last, in a process of its own that imports a checkout."""
    for key, value in facts.items():
        code = code.replace(f"{{{key}!r}}", repr(value)).replace(f"{{{key}}}", str(value))
    paths = os.environ | environment | {"PYTHONPATH": str(checkout.resolve()), "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=paths, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{checkout}: {done.stderr.strip()}")
    return float(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
