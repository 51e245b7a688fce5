"""Fixtures that the tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import SIZES, Pixels, build, photograph, write_image


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
