"""Rivals with chunked arrays: h5py on contiguous and chunked datasets, zarr, and TensorStore."""

import importlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from crops import Task
from reading import Pixels, Start, Way, by_batch, by_crop, image_pixels, slices
from rivals_rows import planes

from loader import ImageDataset
from loader.format.layout import HR, plane_group

# Chunk sizes in pixels: the best of 64, 128, 256 and 512 for these crops, with a file per chunk, or one file.
ZARR_CHUNK = 256
TENSORSTORE_CHUNK = 128


def write_contiguous(images: dict[int, ImageDataset], folder: Path) -> None:
    """Write one HDF5 file with a contiguous dataset for each image and plane."""
    with h5py.File(folder / "images.h5", "w", libver="latest") as file:
        for scale in planes(images):
            for number in range(len(images[max(images)])):
                file.create_dataset(f"x{scale}/{number}", data=image_pixels(images, scale, number))


def open_contiguous(task: Task) -> Start:
    """Read slices of open datasets."""
    count = len(task.dataset().shards.index.name)
    file = h5py.File(task.folder / "hdf5" / "images.h5", "r")
    lr, hr = ([file[f"x{scale}/{i}"] for i in range(count)] for scale in (task.scale, 1))
    return by_crop(task, slices(task, lr, hr), step=16)


def open_chunked(task: Task) -> Start:
    """Read slices of open datasets in our own HDF5 shards."""
    index, folder = task.dataset().shards.index, task.folder / "shards"
    files = [h5py.File(folder / shard.file, "r") for shard in index.shards]
    lr, hr = (
        [files[index.shard[i]][plane_group(scale)][index.name[i]] for i in range(len(index.name))]
        for scale in (task.scale, HR)
    )
    return by_crop(task, slices(task, lr, hr), step=16)


def write_zarr(images: dict[int, ImageDataset], folder: Path, chunk: int = ZARR_CHUNK, sharded: bool = False) -> None:
    """Write an uncompressed array for each image and plane; `sharded`: with all its chunks in one file."""
    zarr: Any = importlib.import_module("zarr")
    for scale in planes(images):
        for number in range(len(images[max(images)])):
            pixels = image_pixels(images, scale, number)
            height, width, channels = pixels.shape
            side = min(chunk, height, width)
            array = zarr.create_array(
                store=folder / f"x{scale}" / str(number),
                shape=pixels.shape,
                chunks=(side, side, channels),
                shards=(-(-height // side) * side, -(-width // side) * side, channels) if sharded else None,
                dtype="uint8",
                compressors=None,
                filters=None,
            )
            array[:] = pixels


def open_zarr(task: Task) -> Start:
    """Read slices of open arrays."""
    zarr: Any = importlib.import_module("zarr")
    zarr.config.set({"async.concurrency": max(10, task.in_flight)})
    count = len(task.dataset().shards.index.name)
    lr, hr = (
        [zarr.open_array(task.folder / "zarr" / f"x{scale}" / str(i), mode="r") for i in range(count)]
        for scale in (task.scale, 1)
    )
    return by_crop(task, slices(task, lr, hr), step=16)


def write_sharded(images: dict[int, ImageDataset], folder: Path) -> None:
    """Write the arrays for TensorStore."""
    write_zarr(images, folder, TENSORSTORE_CHUNK, sharded=True)


def open_tensorstore(task: Task) -> Start:
    """Read zarr arrays with TensorStore, starting all reads of a batch before waiting for the first."""
    ts: Any = importlib.import_module("tensorstore")
    cores = len(task.cores) if task.cores else 0
    limits = {"file_io_concurrency": cores or task.in_flight, "data_copy_concurrency": cores}
    context = ts.Context({key: {"limit": limit} for key, limit in limits.items() if limit})

    def stores(scale: int) -> list[Any]:
        root = task.folder / "tensorstore" / f"x{scale}"
        specs = [
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{root / str(i)}/"}}
            for i in range(len(task.dataset().shards.index.name))
        ]
        opening = [ts.open(spec, context=context, read=True, recheck_cached="open") for spec in specs]
        return [future.result() for future in opening]

    lr, hr, crops, scale, (patch, side) = stores(task.scale), stores(1), task.crops(), task.scale, task.sides
    image, top, left = crops.image.tolist(), crops.top.tolist(), crops.left.tolist()

    def read(samples: range, to_lr: Pixels, to_hr: Pixels) -> None:
        with ts.Batch() as batch:
            reads = [
                (
                    lr[image[n]][top[n] : top[n] + patch, left[n] : left[n] + patch].read(batch=batch),
                    hr[image[n]][top[n] * scale : top[n] * scale + side, left[n] * scale : left[n] * scale + side].read(
                        batch=batch
                    ),
                )
                for n in samples
            ]
        for k, (small, large) in enumerate(reads):
            to_lr[k] = np.asarray(small.result())
            to_hr[k] = np.asarray(large.result())

    return by_batch(task, read)


CONTIGUOUS = Way(
    "h5py contiguous",
    "hdf5",
    open_contiguous,
    "one HDF5 file, a contiguous dataset per image and plane, datasets kept open; crops are slices",
    write_contiguous,
)
CHUNKED = Way(
    "h5py chunked",
    "shards",
    open_chunked,
    "our own HDF5 shards (64-pixel chunks) by h5py, datasets kept open; crops are slices",
)
ZARR = Way(
    "zarr",
    "zarr",
    open_zarr,
    f"zarr 3, an array per image and plane, chunks of {ZARR_CHUNK} × {ZARR_CHUNK} pixels, no compressor, arrays kept "
    "open; crops are slices",
    write_zarr,
)
TENSORSTORE = Way(
    "TensorStore",
    "tensorstore",
    open_tensorstore,
    f"driver zarr3, an array per image and plane, chunks of {TENSORSTORE_CHUNK} × {TENSORSTORE_CHUNK} pixels in one "
    "shard file each, no compressor; all reads of a batch begun in one ts.Batch, then waited for; its threads limited "
    "to the one core",
    write_sharded,
)
TENSORSTORE_ALL = Way(
    "TensorStore, all cores",
    "tensorstore",
    open_tensorstore,
    "the same with its own default of threads, or on cold and slow storage file_io_concurrency 32",
    write_sharded,
    all_cores=True,
)
