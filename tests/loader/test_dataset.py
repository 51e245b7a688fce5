"""PatchDataset and ImageDataset compared with slices of the source images, with every kind of DataLoader."""

import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Pixels, build, write_image
from torch.utils.data import DataLoader

from loader import FormatError, ImageDataset, PatchDataset, ShardsError
from loader.format.layout import HR
from loader.pixels import tiles as tiles_module
from loader.pixels.crops import PlaneCrops
from loader.pixels.shards import Shards
from loader.pixels.tiles import transformed
from loader.resize.imresize import imresize
from prep.images.decode import read_image


@pytest.fixture(params=["compiled", "fallback"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gather with and without the compiled kernel."""
    if request.param == "fallback":
        monkeypatch.setattr(tiles_module, "gather_kernel", None)
    elif tiles_module.gather_kernel is None:
        pytest.skip("needs the compiled kernel")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("patch", [1, 16, 21])
def test_samples_match_their_crops(dataset: Path, pictures: dict[str, Pixels], scale: int, patch: int) -> None:
    """Compare with the slow path: decode, crop, shrink, slice, transform."""
    data = PatchDataset(dataset, scale, patch, length=60, seed=5, too_small="skip", fixed=True)
    whole = {}
    for name, pixels in pictures.items():
        cropped = pixels[: pixels.shape[0] // scale * scale, : pixels.shape[1] // scale * scale]
        whole[name] = (imresize(cropped, scale), cropped)
    pairs = data.__getitems__(list(range(60)))
    seen = set()
    for n, (lr, hr) in enumerate(pairs):
        crop = data.crop(n)
        seen.add((crop.image, crop.transform))
        for found, zoom, full in ((lr, 1, whole[crop.image][0]), (hr, scale, whole[crop.image][1])):
            side, top, left = patch * zoom, crop.top * zoom, crop.left * zoom
            expected = transformed(full[top : top + side, left : left + side], crop.transform)
            assert found.shape == (3, side, side)
            assert found.dtype == torch.uint8
            np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), expected)
        alone = data[n]
        assert torch.equal(alone[0], lr)
        assert torch.equal(alone[1], hr)
    assert len(seen) > 6


def test_length_and_range(dataset: Path, pictures: dict[str, Pixels]) -> None:
    data = PatchDataset(dataset, 2, 16)
    assert len(data) == sum((h // 2 // 16) * (w // 2 // 16) for h, w, _ in (p.shape for p in pictures.values()))
    assert torch.equal(data[-1][1], data[len(data) - 1][1])
    for n in (len(data), -len(data) - 1):
        with pytest.raises(IndexError, match="sample: expected 0 to"):
            data[n]
    assert len(PatchDataset(dataset, 2, 16, length=7)) == 7


def test_epochs_and_seeds(dataset: Path) -> None:
    def crops(seed: int, epoch: int, augment: bool = True) -> list[object]:
        data = PatchDataset(dataset, 2, 16, seed=seed, augment=augment)
        data.set_epoch(epoch)
        assert data.epoch == epoch
        return [data.crop(n) for n in range(20)]

    assert crops(0, 0) == crops(0, 0)
    assert crops(0, 1) != crops(1, 0) != crops(0, 0) != crops(0, 1)
    assert {crop.transform for crop in crops(0, 0, augment=False)} == {0}  # type: ignore[attr-defined]


def draw(loader: DataLoader[tuple[torch.Tensor, torch.Tensor]]) -> list[bytes]:
    return [lr.numpy().tobytes() + hr.numpy().tobytes() for lr, hr in loader]


@pytest.fixture(scope="module")
def expected(dataset: Path) -> list[list[bytes]]:
    """Batches of two epochs, read without workers."""
    data = PatchDataset(dataset, 4, 8, length=10)
    epochs = []
    for epoch in (0, 7):
        data.set_epoch(epoch)
        epochs.append(draw(DataLoader(data, batch_size=4)))
    assert epochs[0] != epochs[1]
    return epochs


@pytest.mark.parametrize(("start", "workers"), [("fork", 1), ("fork", 2), ("spawn", 2)])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_samples_are_independent_of_workers(
    dataset: Path, expected: list[list[bytes]], start: str, workers: int, persistent: bool
) -> None:
    data = PatchDataset(dataset, 4, 8, length=10)
    loader = DataLoader(
        data, batch_size=4, num_workers=workers, persistent_workers=persistent, multiprocessing_context=start
    )
    for epoch, batches in zip((0, 7), expected, strict=True):
        data.set_epoch(epoch)
        assert draw(loader) == batches


def test_pickles_are_small_and_reopen(dataset: Path) -> None:
    data = PatchDataset(dataset, 4, 8, seed=3)
    data.set_epoch(2)
    text = pickle.dumps(data)
    again = pickle.loads(text)
    assert len(pickle.dumps(data.shards)) < 400
    assert again.crop(5) == data.crop(5)
    assert torch.equal(again[5][1], data[5][1])


def test_rebuilt_dataset_is_refused_on_unpickling(folder: Path, tmp_path: Path) -> None:
    text = pickle.dumps(Shards(build(folder, tmp_path / "out")))
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    build(folder, tmp_path / "out", scales=(2,))
    with pytest.raises(FormatError, match="expected the dataset opened before, got one built since"):
        pickle.loads(text)


def test_shard_truncated_after_opening_is_refused(folder: Path, tmp_path: Path) -> None:
    data = PatchDataset(build(folder, tmp_path / "out", images_per_shard=9), 4, 8)
    shard = tmp_path / "out" / data.shards.index.shards[0].file
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FormatError, match="length: expected"):
        data[0]
    shard.unlink()
    with pytest.raises(FormatError, match="expected a file that can be read, got No such file"):
        data[0]


def test_rebuilt_dataset_is_not_mixed_with_old_one(folder: Path, tmp_path: Path) -> None:
    """New shards have the old names and lengths: mapped ones keep the old pixels, unmapped ones are refused."""
    out = build(folder, tmp_path / "out", images_per_shard=2)
    mapped, late = Shards(out), Shards(out)
    before = mapped.tiles(0, 1).copy()
    for path in folder.iterdir():
        write_image(tmp_path / "others" / path.name, 255 - read_image(path))
    build(tmp_path / "others", tmp_path / "new", images_per_shard=2)
    (out / "index.json").unlink()
    for path in (tmp_path / "new").glob("shard-*"):
        assert path.stat().st_size == (out / path.name).stat().st_size
        path.replace(out / path.name)
    with pytest.raises(FormatError, match="expected the dataset opened before, got No such file"):
        late.tiles(0, 1)
    (tmp_path / "new/index.json").replace(out / "index.json")
    for read in (late.tiles, late.read):
        with pytest.raises(FormatError, match="expected the dataset opened before, got one built since"):
            read(0, 1)
    np.testing.assert_array_equal(mapped.tiles(0, 1), before)
    assert (Shards(out).tiles(0, 1) != before).any()


def test_shrinking_mapped_shard_kills_the_process(folder: Path, tmp_path: Path) -> None:
    """FORMAT.md warns of it; positional reads report an error instead."""
    out = build(folder, tmp_path / "out", images_per_shard=9)
    code = (
        "import os, sys\nfrom loader import FormatError\nfrom loader.pixels.shards import Shards\n"
        "from loader.pixels.files import Files\nimport numpy as np\n"
        f"shards = Shards({str(out)!r})\ntiles = shards.tiles(4, 1)\nfiles = Files(shards.folder, shards.index)\n"
        "files.read(0, 0, np.empty(1, np.uint8))\nos.truncate(shards.folder / shards.index.shards[0].file, 8192)\n"
        "try: files.read(0, int(shards.index.planes[1].offset[4]), np.empty(64, np.uint8))\n"
        "except FormatError as error: print(error, flush=True)\n"
        "tiles.sum()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == -signal.SIGBUS
    assert re.search(r"shard-00000.h5: expected bytes \d+ to \d+, got end of file at \d+", run.stdout), run.stderr


def test_small_images(dataset: Path) -> None:
    with pytest.raises(ShardsError, match=r"at least 100 × 100 pixels .*, got 4 of 5 smaller: b, c, d e, ü; too_small"):
        PatchDataset(dataset, 4, 25)
    data = PatchDataset(dataset, 4, 25, length=50, too_small="skip")
    assert {data.crop(n).image for n in range(50)} == {"a"}
    with pytest.raises(ShardsError, match="got 5 of 5 smaller"):
        PatchDataset(dataset, 4, 100, too_small="skip")


def test_wrong_arguments(dataset: Path) -> None:
    for kind in (PatchDataset, ImageDataset):
        with pytest.raises(ShardsError, match=r"scale: expected one that was built \(2, 3, 4\), got 8"):
            kind(dataset, scale=8)
    for name, value in {"lr_patch": 0, "length": 0, "seed": -1, "too_small": "drop"}.items():
        with pytest.raises(ValueError, match=f"{name}: expected .*, got"):
            PatchDataset(dataset, 4, **({"lr_patch": 8} | {name: value}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="epoch: expected 0 to .*, got -1"):
        PatchDataset(dataset, 4, 8).set_epoch(-1)


def test_whole_images(dataset: Path, pictures: dict[str, Pixels]) -> None:
    data = ImageDataset(dataset, 3)
    assert len(data) == len(pictures)
    assert list(data.names) == list(pictures)
    pairs: Iterator[tuple[str, Pixels]] = iter(pictures.items())
    for i, (name, pixels) in enumerate(pairs):
        lr, hr = data[i]
        expected = pixels[: pixels.shape[0] // 3 * 3, : pixels.shape[1] // 3 * 3]
        np.testing.assert_array_equal(hr.permute(1, 2, 0).numpy(), expected)
        np.testing.assert_array_equal(lr.permute(1, 2, 0).numpy(), imresize(expected, 3))
        assert torch.equal(data[name][0], lr)
    assert torch.equal(data[-1][0], data[4][0])
    with pytest.raises(IndexError):
        data[5]
    with pytest.raises(KeyError, match="expected the name of one of 5 images, got 'z'"):
        data["z"]


@pytest.mark.usefixtures("kernel")
def test_crops_beyond_an_image_are_refused(dataset: Path) -> None:
    shards = Shards(dataset)
    out, zero = np.empty((1, 8, 8, 3), np.uint8), np.zeros(1, np.int64)
    edge = (1 << 63) - 1  # adding a height overflows
    for top, left in ((-1, 0), (0, -1), (125, 0), (0, 190), (edge, 0), (0, edge), (edge - 7, 0), (-edge - 1, 0)):
        with pytest.raises(IndexError, match=r"HR of image 'a' is 128 × 192: no crop of 8 × 8 at"):
            shards.gather(PlaneCrops(HR, 8, zero, np.array([top]), np.array([left]), zero), out)
    for image in (-1, 5, edge, -edge - 1):
        with pytest.raises(IndexError, match="images: expected 0 to 4, got"):
            shards.gather(PlaneCrops(HR, 8, np.array([image]), zero, zero, zero), out)
