"""Rivals that store images as rows of pixels, or compressed: PNG files, BasicSR's LMDB, and numpy's memory maps."""

import importlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from crops import Task
from reading import Pixels, Start, Way, by_crop, image_pixels, slices

from loader import ImageDataset

PNG_STEP = 4  # samples between checks of the clock: PNG is slow
SUB, SUB_STEP = 480, 240  # BasicSR's sub-images of DIV2K: size and step in HR pixels
THREADS = 16


def planes(images: dict[int, ImageDataset]) -> list[int]:
    """Return the levels of the planes: 1 for HR, and each scale."""
    return [1, *images]


def write_png(images: dict[int, ImageDataset], folder: Path) -> None:
    """Write a PNG file for each image and plane, with OpenCV's defaults."""
    for scale in planes(images):
        (folder / f"x{scale}").mkdir()
        for number in range(len(images[max(images)])):
            cv2.imwrite(str(folder / f"x{scale}" / f"{number}.png"), image_pixels(images, scale, number)[..., ::-1])


def open_png(task: Task, threads: int = 1) -> Start:
    """Decode both whole images for each crop."""
    (patch, side), scale, folder = task.sides, task.scale, task.folder / "png"

    def copy(image: int, top: int, left: int, to_lr: Pixels, to_hr: Pixels) -> None:
        lr, hr = (decoded(cv2.imread(str(folder / f"x{plane}" / f"{image}.png"))) for plane in (scale, 1))
        to_lr[:] = lr[top : top + patch, left : left + patch]
        to_hr[:] = hr[top * scale :, left * scale :][:side, :side]

    return by_crop(task, copy, step=max(PNG_STEP, threads), threads=threads)


def decoded(pixels: Any) -> Pixels:
    """Return an image decoded by OpenCV, which reports failure as None."""
    if pixels is None:
        raise RuntimeError("expected an image that OpenCV reads, got none")
    array: Pixels = pixels
    return array


def write_lmdb(images: dict[int, ImageDataset], folder: Path) -> None:
    """Write an LMDB for each plane, with PNG sub-images (compression 1) by name, like BasicSR's scripts."""
    lmdb: Any = importlib.import_module("lmdb")
    for scale in planes(images):
        with lmdb.open(str(folder / f"x{scale}.lmdb"), map_size=1 << 40) as store:
            for number in range(len(images[max(images)])):
                pixels = image_pixels(images, scale, number)
                side = SUB // scale
                with store.begin(write=True) as transaction:
                    for i, top in enumerate(sub_starts(pixels.shape[0], side, SUB_STEP // scale)):
                        for j, left in enumerate(sub_starts(pixels.shape[1], side, SUB_STEP // scale)):
                            part = np.ascontiguousarray(pixels[top : top + side, left : left + side, ::-1])
                            _, png = cv2.imencode(".png", part, [cv2.IMWRITE_PNG_COMPRESSION, 1])
                            transaction.put(f"{number}_{i}_{j}".encode(), png.tobytes())


def sub_starts(length: int, side: int, step: int) -> list[int]:
    """Return where sub-images start along one axis: at every step, plus one that ends with the image."""
    starts = list(range(0, length - side + 1, step))
    return starts if starts[-1] + side == length else [*starts, length - side]


def open_lmdb(task: Task) -> Start:
    """Decode the pair of sub-images in which a crop begins, and crop it; crops that exceed it are shifted inside."""
    lmdb: Any = importlib.import_module("lmdb")
    (patch, side), scale = task.sides, task.scale
    index = task.dataset().shards.index
    height, width = (sizes.tolist() for sizes in index.sizes(scale))
    stores = {
        plane: lmdb.open(
            str(task.folder / "lmdb" / f"x{plane}.lmdb"), readonly=True, lock=False, readahead=False, meminit=False
        )
        for plane in (scale, 1)
    }
    sub, step = SUB // scale, SUB_STEP // scale  # in LR pixels

    def load(plane: int, key: bytes) -> Pixels:
        with stores[plane].begin(buffers=True) as transaction:
            return decoded(cv2.imdecode(np.frombuffer(transaction.get(key), np.uint8), cv2.IMREAD_COLOR))

    def within(at: int, length: int) -> tuple[int, int]:
        """Return the sub-image of a crop, and the crop's position in it."""
        starts = sub_starts(length, sub, step)
        number = max(i for i, start in enumerate(starts) if start <= at)
        return number, min(at - starts[number], sub - patch)

    def copy(image: int, top: int, left: int, to_lr: Pixels, to_hr: Pixels) -> None:
        (i, y), (j, x) = within(top, height[image]), within(left, width[image])
        key = f"{image}_{i}_{j}".encode()
        to_lr[:] = load(scale, key)[y : y + patch, x : x + patch]
        to_hr[:] = load(1, key)[y * scale :, x * scale :][:side, :side]

    return by_crop(task, copy, step=16)


def write_npy(images: dict[int, ImageDataset], folder: Path) -> None:
    """Write an .npy file for each image and plane."""
    for scale in planes(images):
        (folder / f"x{scale}").mkdir()
        for number in range(len(images[max(images)])):
            np.save(folder / f"x{scale}" / f"{number}.npy", image_pixels(images, scale, number))


def open_npy(task: Task, threads: int = 1) -> Start:
    """Slice crops from np.load(mmap_mode="r") of every image, kept open."""
    count = len(task.dataset().shards.index.name)

    def maps(scale: int) -> list[Pixels]:
        return [np.load(task.folder / "npy" / f"x{scale}" / f"{i}.npy", mmap_mode="r") for i in range(count)]

    return by_crop(task, slices(task, maps(task.scale), maps(1)), step=16, threads=threads)


def open_npy_each(task: Task) -> Start:
    """Call np.load(mmap_mode="r") on both images for each crop."""
    (patch, side), scale, folder = task.sides, task.scale, task.folder / "npy"

    def copy(image: int, top: int, left: int, to_lr: Pixels, to_hr: Pixels) -> None:
        y, x = top * scale, left * scale
        to_lr[:] = np.load(folder / f"x{scale}" / f"{image}.npy", mmap_mode="r")[top : top + patch, left : left + patch]
        to_hr[:] = np.load(folder / "x1" / f"{image}.npy", mmap_mode="r")[y : y + side, x : x + side]

    return by_crop(task, copy, step=16)


PNG = Way(
    "PNG decoding",
    "png",
    open_png,
    "cv2.imread of the whole LR and HR image for each crop, as loaders of image folders do; OpenCV's own threads off",
    write_png,
)
PNG_THREADS = Way(
    f"PNG decoding, {THREADS} threads",
    "png",
    lambda task: open_png(task, THREADS),
    f"the same in {THREADS} threads, so that one crop's wait is another's turn",
    write_png,
    all_cores=True,
)
LMDB = Way(
    "LMDB of PNG sub-images",
    "lmdb",
    open_lmdb,
    f"BasicSR's layout: HR cut into {SUB}-pixel sub-images at steps of {SUB_STEP}, LR alike, PNG compression 1; "
    "readonly=True, lock=False, readahead=False, as BasicSR opens it. A sample decodes the pair that the crop begins "
    "in; the few crops that lie in no sub-image are moved into it. No conversion to float, which BasicSR adds",
    write_lmdb,
)
NPY = Way(
    "np.memmap on rows",
    "npy",
    open_npy,
    'np.load(mmap_mode="r") of one .npy file per image and plane, all kept open; crops are slices',
    write_npy,
)
NPY_THREADS = Way(
    f"np.memmap on rows, {THREADS} threads",
    "npy",
    lambda task: open_npy(task, THREADS),
    f"the same in {THREADS} threads",
    write_npy,
    all_cores=True,
)
NPY_EACH = Way(
    "np.load mmap per crop",
    "npy",
    open_npy_each,
    'np.load(mmap_mode="r") of the two .npy files anew for each crop, as a Dataset without state does',
    write_npy,
)
