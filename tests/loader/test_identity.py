"""dataset_identity: the same for the same pixels whatever their files, another for anything that training would see."""

import hashlib
import shutil
import struct
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import Pixels, build, write_image
from numpy.typing import NDArray

from loader.format.identity import dataset_identity
from loader.format.index import read_index
from loader.format.layout import Index, LrOrigin, Plane, Shard, Strings
from loader.resize.imresize import imresize

Column = NDArray[np.int64]


@pytest.fixture(scope="module")
def identity(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("identity") / "out"
    return dataset_identity(read_index(build(folder, out, scales=(2, 4))), 2)


@pytest.mark.parametrize(
    "change",
    [
        {"container": "raw"},
        {"images_per_shard": 1},
        {"images_per_shard": 99},
        {"scales": (2,)},
        {"scales": (2, 3, 8)},
        {"workers": 2},
    ],
    ids=str,
)
def test_same_pixels(folder: Path, tmp_path: Path, identity: str, change: dict[str, object]) -> None:
    assert dataset_identity(read_index(build(folder, tmp_path / "out", **change)), 2) == identity  # type: ignore[arg-type]


def test_program_and_copy(folder: Path, tmp_path: Path, identity: str) -> None:
    index = read_index(build(folder, tmp_path / "out"))
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    for same in (replace(index, made_by="another 9.9", lr=LrOrigin("given"), sha256=""), read_index(tmp_path / "copy")):
        assert dataset_identity(same, 2) == identity
    assert dataset_identity(index, 4) != identity


def test_a_pixel_of_hr_or_lr(folder: Path, tmp_path: Path, pictures: dict[str, Pixels], identity: str) -> None:
    """LR that is given may change alone; LR of another scale does not count."""
    shutil.copytree(folder, tmp_path / "hr")
    for name, pixels in pictures.items():
        for scale in (2, 4):
            cropped = pixels[: pixels.shape[0] // scale * scale, : pixels.shape[1] // scale * scale]
            write_image(tmp_path / f"lr/X{scale}/{name}x{scale}.png", imresize(cropped, scale))

    def found(name: str) -> str:
        return dataset_identity(read_index(build(tmp_path / "hr", tmp_path / name, lr=tmp_path / "lr")), 2)

    def nudge(path: Path, pixels: Pixels) -> None:
        pixels = pixels.copy()
        pixels[-1, -1, 2] ^= 1
        write_image(path, pixels)

    assert found("given") == identity
    nudge(tmp_path / "lr/X4/bx4.png", imresize(pictures["b"][:128, :96], 4))
    assert found("x4") == identity
    nudge(tmp_path / "lr/X2/bx2.png", imresize(pictures["b"][:130, :96], 2))
    other = found("x2")
    assert other != identity
    nudge(tmp_path / "hr/a.png", pictures["a"])
    assert found("hr") not in (identity, other)


def test_names_and_order(folder: Path, tmp_path: Path, identity: str) -> None:
    shutil.copytree(folder, tmp_path / "in")
    (tmp_path / "in/b.png").rename(tmp_path / "in/bb.png")
    renamed = dataset_identity(read_index(build(tmp_path / "in", tmp_path / "one")), 2)
    (tmp_path / "in/bb.png").rename(tmp_path / "in/z.png")
    assert len({identity, renamed, dataset_identity(read_index(build(tmp_path / "in", tmp_path / "two")), 2)}) == 3
    index = read_index(tmp_path / "one")
    names = list(index.name)
    swapped = replace(index, name=Strings([names[1], names[0], *names[2:]]))
    joined = replace(index, name=Strings([names[0] + names[1][:1], names[1][1:], *names[2:]]))
    assert len({renamed, dataset_identity(swapped, 2), dataset_identity(joined, 2)}) == 3


def given_index(name: Strings, shard: Column, height: Column, width: Column, planes: dict[int, Plane]) -> Index:
    return Index(
        container="raw",
        made_by="x",
        libraries={},
        lr=LrOrigin("given"),
        images_per_shard=len(name),
        shards=(Shard("s", 1, ""),),
        name=name,
        shard=shard,
        height=height,
        width=width,
        planes=planes,
    )


def test_the_bytes_never_change() -> None:
    """Checkpoints hold the digest."""
    column = np.arange(3)
    planes = {scale: Plane(64 // scale, column, column + scale, None, None) for scale in (1, 2)}
    names = Strings(["a", "ü", "c d"])
    index = given_index(names, column, column + 7, column + 9, planes)
    text = b"srshards identity 1: x2 64 32 3\n"
    text += struct.pack("<15q", 7, 8, 9, 9, 10, 11, 1, 2, 3, 2, 3, 4, 1, 2, 3) + "aüc d".encode()
    assert dataset_identity(index, 2) == hashlib.sha256(text).hexdigest()
    assert dataset_identity(index, 2) == "a0fbce2b7a19b5360e26d2fd15cd3d5bb0d65d5d6660bea75e75811cf21b1857"


def test_a_million_images() -> None:
    count = 1_000_000
    column = np.arange(count)
    planes = {scale: Plane(64, column, column, None, None) for scale in (1, 4)}
    names = Strings([f"{i:07d}" for i in range(count)])
    index = given_index(names, column, column, column, planes)
    start = time.perf_counter()
    assert len(dataset_identity(index, 4)) == 64
    print(f"identity of {count} images: {time.perf_counter() - start:.3f} s")
