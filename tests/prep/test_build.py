"""Building: shards hold the pixels of the images, bytes do not depend on how they are built, failures leave nothing."""

import hashlib
import json
import shutil
import time
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import Pixels, build, digests, make_plan, photograph, write_image

from loader.errors import ShardsError
from loader.format.index import read_index
from loader.format.layout import HR, PAGE
from loader.pixels.shards import Shards
from loader.pixels.tiles import gather_crops, split
from loader.resize.imresize import Border, imresize
from prep.build.build import build_dataset
from prep.plan.dataset import default_images_per_shard
from prep.shard.writers import open_writer


def plane(shards: Shards, image: int, scale: int) -> Pixels:
    """Return all pixels of an image in a plane, after comparing mapped and positional reads."""
    height, width = (int(sizes[image]) for sizes in shards.index.sizes(scale))
    out = np.empty((1, height, width, 3), np.uint8)
    zero = np.zeros(1, np.int64)
    number, entry = np.array([image]), shards.index.planes[scale]
    address = shards.addresses(shards.index.shard[number]) + entry.offset[number]
    gather_crops(address, shards.index.columns_of_tiles(scale, number), zero, zero, zero, entry.tile, out)
    pixels: Pixels = out[0]
    np.testing.assert_array_equal(shards.read(image, scale), pixels)
    return pixels


def test_every_plane_holds_its_pixels(dataset: Path, pictures: dict[str, Pixels]) -> None:
    shards = Shards(dataset)
    assert list(shards.index.name) == list(pictures)
    for i, hr in enumerate(pictures.values()):
        np.testing.assert_array_equal(plane(shards, i, HR), hr)
        for scale in (2, 3, 4):
            height, width = hr.shape[0] // scale * scale, hr.shape[1] // scale * scale
            np.testing.assert_array_equal(plane(shards, i, scale), imresize(hr[:height, :width], scale))


def test_runs_checksums_and_sources(dataset: Path, folder: Path, pictures: dict[str, Pixels]) -> None:
    shards = Shards(dataset)
    for scale, entry in shards.index.planes.items():
        assert entry.tile == (64 if scale == HR else 32)
        for i in range(len(pictures)):
            data = (dataset / shards.index.shards[int(shards.index.shard[i])].file).read_bytes()
            run = data[entry.offset[i] :][: int(shards.index.run_lengths(scale)[i])]
            assert run == split(plane(shards, i, scale), entry.tile).tobytes()
            assert zlib.crc32(run) == entry.crc32[i]
    hr = shards.index.planes[HR]
    assert hr.source is not None
    assert hr.source_sha256 is not None
    for name, source, digest in zip(shards.index.name, hr.source, hr.source_sha256, strict=True):
        assert source == f"{name}.png"
        assert digest == hashlib.sha256((folder / source).read_bytes()).hexdigest()
    for shard in shards.index.shards:
        assert shard.sha256 == hashlib.sha256((dataset / shard.file).read_bytes()).hexdigest()


def test_hdf5_shards_are_ordinary_files(folder: Path, pictures: dict[str, Pixels], tmp_path: Path) -> None:
    """Any HDF5 tool can slice their datasets."""
    build(folder, tmp_path / "out", images_per_shard=3)
    seen = {}
    for path in sorted((tmp_path / "out").glob("*.h5")):
        with h5py.File(path) as file:
            assert set(file) == {"HR", "LR_bicubic"}
            assert set(file["LR_bicubic"]) == {"X2", "X4"}
            for name, data in file["HR"].items():
                assert data.chunks == (64, 64, 3)
                assert data.compression is None
                assert data.id.get_chunk_info(0).byte_offset % PAGE == 0
                np.testing.assert_array_equal(data[...], pictures[name])
                lr = file["LR_bicubic/X4"][name]
                assert lr.shape == (data.shape[0] // 4, data.shape[1] // 4, 3)
                seen[name] = data.shape
    assert seen == {name: pixels.shape for name, pixels in pictures.items()}


@pytest.mark.parametrize("container", ["hdf5", "raw"])
def test_writers_agree(container: str, tmp_path: Path) -> None:
    """The contract of ShardWriter: page-aligned runs, in order, with exactly the bytes given."""
    runs = []
    with open_writer(container, tmp_path / "shard", (2,), 16 * 16 * 3) as writer:
        for i, (height, width, side) in enumerate([(130, 70, 64), (5, 3, 64), (33, 32, 32), (1, 1, 16)]):
            tiles = split(photograph(height, width, i), side)
            scale = HR if side == 64 else 2
            runs.append((writer.write(scale, f"image {i}", height, width, tiles), tiles.tobytes()))
    data = (tmp_path / "shard").read_bytes()
    end = 0
    for offset, run in runs:
        assert offset % PAGE == 0
        assert offset >= end
        end = offset + len(run)
        assert data[offset:end] == run
    with pytest.raises(OSError, match="exist"):
        open_writer(container, tmp_path / "shard", (2,), 4096)


@pytest.mark.parametrize("container", ["hdf5", "raw"])
def test_bytes_do_not_depend_on_workers_paths_or_time(container: str, folder: Path, tmp_path: Path) -> None:
    once = digests(build(folder, tmp_path / "one", container=container, images_per_shard=1))
    assert len(once) == 6
    elsewhere = tmp_path / "moved" / "images"
    shutil.copytree(folder, elsewhere)
    time.sleep(1.1)  # HDF5 stores times in whole seconds
    again = digests(build(elsewhere, tmp_path / "deep" / "two", container=container, images_per_shard=1, workers=3))
    assert again == once
    for path in (tmp_path / "one").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


@pytest.mark.parametrize("border", ["symmetric", "replicate"])
def test_recipe_reaches_the_pixels(folder: Path, pictures: dict[str, Pixels], tmp_path: Path, border: Border) -> None:
    shards = Shards(build(folder, tmp_path / "out", scales=(8,), tile=16, resize="matlab-double", border=border))
    assert shards.index.planes[8].tile == 16
    assert vars(shards.index.lr) == {"made": "imresize", "resize": "matlab-double", "border": border}
    expected = imresize(pictures["a"], 8, rounding="double", border=border)
    np.testing.assert_array_equal(plane(shards, 0, 8), expected)


def test_given_lr_is_stored_unchanged(folder: Path, pictures: dict[str, Pixels], tmp_path: Path) -> None:
    given = {}
    for name, hr in pictures.items():
        for scale, size in (
            (2, (hr.shape[0] // 2, hr.shape[1] // 2)),
            (4, (-(-hr.shape[0] // 4), -(-hr.shape[1] // 4))),
        ):
            given[name, scale] = photograph(*size, seed=scale)
            write_image(tmp_path / f"lr/X{scale}/{name}x{scale}.png", given[name, scale])
    shards = Shards(build(folder, tmp_path / "out", lr=tmp_path / "lr"))
    assert shards.index.lr.made == "given"
    source = shards.index.planes[4].source
    assert source is not None
    assert list(source) == [f"{name}x4.png" for name in pictures]
    for i, name in enumerate(pictures):
        np.testing.assert_array_equal(plane(shards, i, 2), given[name, 2])
        height, width = shards.index.sizes(4)
        np.testing.assert_array_equal(plane(shards, i, 4), given[name, 4][: height[i], : width[i]])


def with_bad_images(folder: Path, place: Path) -> Path:
    """Copy the images, and add three that cannot be used."""
    shutil.copytree(folder, place)
    (place / "bad1.png").write_text("no image")
    (place / "bad2.jpg").write_bytes(b"")
    write_image(place / "tiny.png", photograph(3, 9))
    return place


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_images_fail_the_build(folder: Path, tmp_path: Path, workers: int) -> None:
    source = with_bad_images(folder, tmp_path / "images")
    with pytest.raises(ShardsError, match=r"bad1.png: expected PNG"):
        build(source, tmp_path / "out", workers=workers, images_per_shard=8)
    assert not (tmp_path / "out").exists()
    # One worker finishes a shard before it reaches the bad image. Of two, the other may be stopped in its first shard.
    kept = r".*1 of 4 shards are finished; run the same command" if workers == 1 else ""
    with pytest.raises(ShardsError, match=rf"(?s)bad1.png: expected PNG{kept}"):
        build(source, tmp_path / "out", workers=workers)
    for name in ("bad1.png", "bad2.jpg", "tiny.png"):
        write_image(source / name, photograph(100, 80))
    build(source, tmp_path / "out", workers=workers)
    assert digests(tmp_path / "out") == digests(build(source, tmp_path / "undisturbed"))


@pytest.mark.parametrize("workers", [1, 3])
def test_bad_images_are_skipped_on_request(folder: Path, tmp_path: Path, workers: int) -> None:
    source = with_bad_images(folder, tmp_path / "images")
    plan = make_plan(source, tmp_path / "out", container="raw")
    done: list[int] = []
    summary = build_dataset(plan, workers, skip_bad=True, overwrite=False, report=done.append)
    assert [(bad.image, bad.source) for bad in summary.skipped] == [
        ("bad1", "bad1.png"),
        ("bad2", "bad2.jpg"),
        ("tiny", "tiny.png"),
    ]
    assert json.loads((tmp_path / "out/skipped.json").read_text()) == [vars(bad) for bad in summary.skipped]
    assert list(read_index(tmp_path / "out").name) == ["a", "b", "c", "d e", "ü"]
    assert done == sorted(done)
    assert workers > 1 or done[-1] == 8


def test_no_usable_image(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("no image")
    plan = make_plan(tmp_path / "images", tmp_path / "out", scales=(2,), container="raw")
    with pytest.raises(ShardsError, match="expected at least one usable image, got none"):
        build_dataset(plan, 1, skip_bad=True, overwrite=False, report=lambda done: None)
    assert not (tmp_path / "out").exists()


def test_an_earlier_dataset_is_kept_until_the_new_one_is_complete(folder: Path, tmp_path: Path) -> None:
    out = build(folder, tmp_path / "out", images_per_shard=1)
    before = digests(out)
    with pytest.raises(ShardsError, match="got another"):
        build(folder, out)
    (out / "notes.txt").write_text("mine")

    def rebuild(source: Path) -> None:
        plan = make_plan(source, out, scales=(2,), container="raw", tile=32, images_per_shard=3)
        build_dataset(plan, 1, skip_bad=False, overwrite=True, report=lambda done: None)

    with pytest.raises(ShardsError, match="bad1"):
        rebuild(with_bad_images(folder, tmp_path / "images"))
    assert before.items() <= digests(out).items()
    assert read_index(out)
    rebuild(folder)
    assert sorted(digests(out)) == ["index.json", "notes.txt", "shard-00000.raw", "shard-00001.raw"]
    assert read_index(out).scales == (2,)


def test_an_unwritable_folder_is_reported(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ShardsError, match=r"file.*could not be written: "):
        build(folder, tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": (5,)}, r"scale: expected some of \(2, 3, 4, 8\)"),
        ({"scales": (), "given_lr": True}, "LR: expected scales for given LR, got none"),
        ({"scales": (4, 2)}, "scale"),
        ({"tile": 60}, "tile: expected a multiple of 16 from 16 to 1024, got 60"),
        ({"tile": 2048}, "tile"),
        ({"images_per_shard": 0}, "images per shard: expected 1 or more, got 0"),
    ],
)
def test_bad_recipes(folder: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ShardsError, match=message):
        build(folder, tmp_path / "out", **change)  # type: ignore[arg-type]


def test_default_number_of_images_per_shard() -> None:
    assert [default_images_per_shard(count) for count in (1, 100, 200, 800, 3450, 85_000)] == [8, 8, 13, 50, 64, 64]
