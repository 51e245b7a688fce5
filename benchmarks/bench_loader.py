"""Patches per second of srshards, rivals and the physical limit: warm, cold, and on slow storage.

python benchmarks/bench_loader.py --images DIR --mosaics 48 --work WORK [--mode warm] [--mode cold]
    [--mode slow --slow-mount "python slowfs.py {source} {mount} --delay-ms 3 --log {log}"]

DIR holds large photographs; --mosaics first assembles that many images of 2040 × 1356 from the photographs in it. WORK,
on the storage to be measured, keeps images, shards and the rivals' files for later runs. Each mode writes a table, raw
figures and a chart to benchmarks/results, and updates the table of targets. benchmarks/README.md describes the setup of
the rivals.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import click
import modes
from common import machine, make_mosaics, versions
from modes import Rounds, Settings
from report import write_all
from results import Results
from rivals_rows import SUB
from ways import MODES, SCALES, build_shards, installed, prepare

from loader.errors import ShardsError
from loader.format.index import read_index
from prep.images.find import find_images

HERE = Path(__file__).parent
MEASURES: dict[str, Callable[..., Rounds]] = {"warm": modes.warm, "cold": modes.cold, "slow": modes.slow}


@click.command()
@click.option("--images", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--mosaics", type=int, help="Assemble this many 2040 × 1356 images from those in the folder.")
@click.option(
    "--work", type=click.Path(path_type=Path), help="Folder for all files, kept.  [default: a temporary folder]"
)
@click.option(
    "--mode", "wanted", multiple=True, type=click.Choice(list(MODES)), help="[default: all that are available]"
)
@click.option("--scale", "scales", multiple=True, type=click.Choice([str(scale) for scale in SCALES]))
@click.option("--only", multiple=True, help="Only ways whose name contains this; repeatable.")
@click.option("--rounds", type=int, help="[default: 11 warm, 5 cold, 3 slow]")
@click.option("--seconds", type=float, help="Per way and round.  [default: 0.3 warm, 1.5 otherwise]")
@click.option("--samples", default=1024, show_default=True, help="At most so many, cold and slow.")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--lr-patch", default=64, show_default=True)
@click.option("--slow-mount", default="", help="Command that mounts {source} at {mount} and logs requests to {log}.")
@click.option("--slow-unmount", default="fusermount -u {mount}", show_default=True)
@click.option("--slow-delay-ms", default=3.0, show_default=True, help="Delay that the mount adds to each request.")
@click.option("--slow-in-flight", default=10, show_default=True, help="Requests that the mount serves concurrently.")
@click.option("--out", default=HERE / "results", type=click.Path(path_type=Path), help="Folder for the results.")
def main(
    images: Path,
    mosaics: int | None,
    work: Path | None,
    wanted: tuple[str, ...],
    scales: tuple[str, ...],
    only: tuple[str, ...],
    rounds: int | None,
    seconds: float | None,
    samples: int,
    batch_size: int,
    lr_patch: int,
    slow_mount: str,
    slow_unmount: str,
    slow_delay_ms: float,
    slow_in_flight: int,
    out: Path,
) -> None:
    """Measure, and write tables, figures and charts."""
    names = wanted or tuple(mode for mode in MODES if mode != "slow" or slow_mount)
    if "slow" in names and not slow_mount:
        raise click.UsageError("--mode slow: expected --slow-mount, got none")
    with nullcontext(work) if work else tempfile.TemporaryDirectory() as folder:
        work = Path(folder).absolute()
        if mosaics:
            make_mosaics(images, work / "images", mosaics)
            images = work / "images"
        build_shards(images, work, os.cpu_count() or 1)
        check(work / "shards", count := len(find_images([images])))
        for name in names:
            ways = [way for way in installed(MODES[name]) if not only or any(part in way.name for part in only)]
            prepare(ways, work)
            settings = Settings(
                rounds=rounds or {"warm": 11, "cold": 5, "slow": 3}[name],
                seconds=seconds or (0.3 if name == "warm" else 1.5),
                samples=samples,
                lr_patch=lr_patch,
                batch_size=batch_size,
                mount=slow_mount,
                unmount=slow_unmount,
                delay_ms=slow_delay_ms,
                in_flight=slow_in_flight,
            )
            readings = {}
            for scale in map(int, scales or map(str, SCALES)):
                readings[scale] = MEASURES[name](ways, work, scale, settings, partial(tell, f"{name} ×{scale}"))
            measured = next(iter(readings.values()))
            how = {way.name: way.how for way in ways}
            how |= {limit: text for limit, text in modes.LIMITS.items() if limit in measured}
            kept = {key: value for key, value in vars(settings).items() if key not in ("mount", "unmount")}
            results = Results(name, machine(), versions(), count, kept, how, readings)
            print(write_all(results, out))


def check(shards: Path, count: int) -> None:
    """Check that the shards hold these images, and that all layouts of the rivals cover whole images."""
    index = read_index(shards)
    if len(index.name) != count:
        raise ShardsError(f"{shards}: expected {count} images, got {len(index.name)}; name another --work")
    for name, height, width in zip(index.name, index.height.tolist(), index.width.tolist(), strict=True):
        if height % max(SCALES) or width % max(SCALES) or min(height, width) < SUB:
            raise ShardsError(
                f"{shards}: image {name!r}: expected sides of at least {SUB} pixels that are multiples of "
                f"{max(SCALES)}, got {height} × {width}; --mosaics makes images that fit"
            )


def tell(what: str, text: str) -> None:
    """Print progress."""
    print(f"{what}: {text}", flush=True)


if __name__ == "__main__":
    main()
