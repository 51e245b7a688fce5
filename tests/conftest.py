"""Images, datasets and helpers that the tests share."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from prep.build import build_dataset, plan_shards
from prep.images import find_images
from prep.shard import Recipe

Pixels = NDArray[np.uint8]

# Names and sizes (H, W) of a small folder of images: whole tiles, parts of tiles, multiples of no scale.
SIZES = {"a": (128, 192), "b": (131, 97), "c": (64, 64), "d e": (65, 300), "ü": (200, 71)}


def photograph(height: int, width: int, seed: int = 0) -> Pixels:
    """An image (H, W, 3) with smooth parts, edges and noise: every pixel different enough to tell crops apart."""
    rng = np.random.default_rng([seed, height, width])
    coarse = rng.integers(0, 256, (height // 9 + 2, width // 9 + 2, 3), np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    noise = rng.integers(-20, 21, (height, width, 3))
    pixels: Pixels = np.clip(smooth + noise, 0, 255).astype(np.uint8)
    return pixels


def write_image(path: Path, rgb: Pixels) -> None:
    """Write RGB pixels to an image file of the kind that its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done, data = cv2.imencode(path.suffix, rgb[..., ::-1])
    assert done
    path.write_bytes(data.tobytes())


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and published results; tests that need it are skipped without it."""
    if not (folder := os.environ.get("SRSHARDS_SHARED")):
        pytest.skip("SRSHARDS_SHARED is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def pictures() -> dict[str, Pixels]:
    """The pixels of a small folder of images, by name."""
    return {name: photograph(*size, seed=i) for i, (name, size) in enumerate(SIZES.items())}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, pictures: dict[str, Pixels]) -> Path:
    """The small folder of images, as PNG files."""
    place = tmp_path_factory.mktemp("images")
    for name, pixels in pictures.items():
        write_image(place / f"{name}.png", pixels)
    return place


Build = Callable[..., Path]


def build(
    source: Path,
    out: Path,
    *,
    lr: Path | None = None,
    workers: int = 1,
    skip_bad: bool = False,
    overwrite: bool = False,
    report: Callable[[int], None] = lambda done: None,
    note: Callable[[str], None] = lambda text: None,
    **changes: object,
) -> Path:
    """Build a dataset of a folder of images, with a recipe changed from the default."""
    options: dict[str, object] = {
        "scales": (2, 4),
        "container": "hdf5",
        "tile": 64,
        "images_per_shard": 2,
        "resize": "matlab-uint8",
        "border": "symmetric",
        "given_lr": lr is not None,
    }
    recipe = Recipe(**(options | changes))  # type: ignore[arg-type]
    plans = plan_shards(find_images([source]), recipe, out, lr)
    build_dataset(plans, workers, skip_bad=skip_bad, overwrite=overwrite, report=report, note=note)
    return out


def digests(folder: Path) -> dict[str, str]:
    """All files in a folder, and the SHA-256 of each."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="session", params=["hdf5", "raw"])
def dataset(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small folder of images as a dataset at ×2, ×3 and ×4, once in each container."""
    out = tmp_path_factory.mktemp("shards") / request.param
    return build(folder, out, container=request.param, scales=(2, 3, 4))


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images that a network can learn something from; `small` is smaller than the others."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(4)
    for name, height, width in (("one", 64, 80), ("two", 72, 60), ("small", 28, 40)):
        rows, columns = np.mgrid[:height, :width]
        edges = 127 + 90 * np.sign(np.sin(rows / 6 + rng.random())[..., None] * np.cos(columns / 7)[..., None])
        image = edges + rng.normal(0, 8, (height, width, 3))
        write_image(folder / f"{name}.png", image.clip(0, 255).astype(np.uint8))
    return folder


@pytest.fixture(scope="session")
def training_shards(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those images as a dataset at ×2."""
    return build(photographs, tmp_path_factory.mktemp("shards") / "train", scales=(2,))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Have torch compute on one thread: small tensors gain nothing from more, and lose much where cores are busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
