"""All ways of reading by mode, and the files that they need."""

import importlib.util
import shutil
from pathlib import Path

import ways_ours as ours
from reading import Way
from rivals_chunks import CHUNKED, CONTIGUOUS, TENSORSTORE, TENSORSTORE_ALL, ZARR
from rivals_ffcv import FFCV
from rivals_rows import LMDB, NPY, NPY_EACH, NPY_THREADS, PNG, PNG_THREADS

from loader import ImageDataset
from prep.build.build import build_dataset
from prep.images.find import find_images
from prep.plan.dataset import default_images_per_shard, plan_dataset
from prep.plan.recipe import Recipe

SCALES = (4, 2)
NEEDS = {LMDB.name: "lmdb", ZARR.name: "zarr", TENSORSTORE.name: "tensorstore", FFCV.name: "ffcv"}
NEEDS |= {TENSORSTORE_ALL.name: "tensorstore"}
ONE_BY_ONE = (NPY, CHUNKED, CONTIGUOUS, NPY_EACH)
MODES: dict[str, tuple[Way, ...]] = {
    "warm": (
        *(ours.MEMCPY, ours.MEMCPY_ALL, ours.GATHER, ours.GATHER_TURNED, ours.GATHER_PLAIN, ours.GATHER_ALL),
        *(ours.DATASET, ours.DATASET_TURNED),
        *(ours.LOADER_1, ours.LOADER_1_TURNED, ours.LOADER_ALL, ours.LOADER_ALL_TURNED),
        *(*ONE_BY_ONE, FFCV, TENSORSTORE, TENSORSTORE_ALL, ZARR, LMDB, PNG),
    ),
    "cold": (
        *(ours.LOADER_AUTO, ours.LOADER_PREAD, ours.DATASET),
        *(NPY_THREADS, *ONE_BY_ONE, FFCV, TENSORSTORE_ALL, ZARR, LMDB, PNG_THREADS, PNG),
    ),
    "slow": (
        *(ours.LOADER_AUTO, ours.LOADER_MMAP, ours.DATASET),
        *(NPY_THREADS, *ONE_BY_ONE, FFCV, TENSORSTORE_ALL, ZARR, LMDB, PNG_THREADS, PNG),
    ),
}


def installed(ways: tuple[Way, ...]) -> list[Way]:
    """Return the ways whose library is installed."""
    return [way for way in ways if way.name not in NEEDS or importlib.util.find_spec(NEEDS[way.name])]


def is_ours(name: str) -> bool:
    """Return whether the way of that name is ours."""
    return name.startswith("ours")


def build_shards(images: Path, work: Path, cores: int) -> None:
    """Build a dataset at ×2 and ×4 with the defaults of `prep build-shards`, if there is none."""
    if (work / "shards").exists():
        return
    files = find_images([images])
    recipe = Recipe(
        scales=tuple(sorted(SCALES)), container="hdf5", tile=64, images_per_shard=default_images_per_shard(len(files)),
        resize="matlab-uint8", border="symmetric",
    )  # fmt: skip
    plan = plan_dataset(files, recipe, work / "shards")
    build_dataset(plan, cores, skip_bad=False, overwrite=False, report=lambda done: None)


def prepare(ways: list[Way], work: Path) -> None:
    """Write the files that ways read from the shards; keep existing ones."""
    images = {scale: ImageDataset(work / "shards", scale) for scale in sorted(SCALES)}
    for way in ways:
        folder = work / way.folder
        if way.prepare is None or folder.exists():
            continue
        print(f"writing {folder}", flush=True)
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        way.prepare(images, part)
        part.rename(folder)
