"""Arguments and items of PatchDataset and ImageDataset: what is accepted, and the errors for the rest."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import build, photograph, write_image

from loader import FormatError, ImageDataset, PatchDataset, PatchLoader, ShardsError
from loader.system import filesystem as storage_module


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(folder, tmp_path_factory.mktemp("shards") / "raw", container="raw", scales=(2, 4))


@pytest.fixture
def patches(shards: Path) -> PatchDataset:
    return PatchDataset(shards, 4, 4, length=12, fixed=True)


@pytest.fixture
def images(shards: Path) -> ImageDataset:
    return ImageDataset(shards, 4)


NOT_INTEGERS: list[Any] = [
    "0801", "1", b"1", 5.7, 5.0, None, True, False, [1, 2], (1, 2), slice(0, 2), slice(None), np.float64(1),
    np.array([1]), np.array(True), torch.tensor(1.0), torch.tensor([1]), torch.tensor(True), ..., {1}, 1j,
]  # fmt: skip


@pytest.mark.parametrize("item", NOT_INTEGERS, ids=repr)
def test_invalid_sample_numbers(patches: PatchDataset, item: Any) -> None:
    """Regression: `data["0801"]` was sample 801, `data[5.7]` was sample 5."""
    with pytest.raises(TypeError, match=r"^sample: expected a whole number, 0 to 11, got ."):
        patches[item]
    with pytest.raises(TypeError, match=r"^sample: expected a whole number"):
        patches.__getitems__([0, item])
    with pytest.raises(TypeError, match=r"^sample: expected a whole number"):
        patches.crop(item)


@pytest.mark.parametrize("item", [item for item in NOT_INTEGERS if not isinstance(item, str)], ids=repr)
def test_invalid_image_numbers(images: ImageDataset, item: Any) -> None:
    with pytest.raises(TypeError, match=r"^image: expected a number, 0 to 4, or a name, got ."):
        images[item]
    with pytest.raises(TypeError, match=r"^image: expected a name, got ."):
        item in images  # noqa: B015


@pytest.mark.parametrize("kind", [int, np.int8, np.int32, np.int64, np.uint64, np.array, torch.tensor])
def test_integer_types_as_items(patches: PatchDataset, images: ImageDataset, kind: Any) -> None:
    for data in (patches, images):
        assert torch.equal(data[kind(3)][0], data[3][0])
        if kind not in (np.uint64,):
            assert torch.equal(data[kind(-2)][1], data[len(data) - 2][1])


def test_sequences_of_samples(patches: PatchDataset) -> None:
    wanted = [patches[n] for n in (3, 0, 3, 11)]
    for samples in ([3, 0, 3, -1], (3, 0, 3, 11), np.array([3, 0, 3, 11]), torch.tensor([3, 0, 3, -1])):
        found = patches.__getitems__(samples)  # type: ignore[arg-type]
        assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(found, wanted, strict=True))
    assert patches.__getitems__([]) == []
    for wrong in ("0801", b"1", 3, None):
        with pytest.raises(TypeError, match="^samples: expected a sequence of whole numbers, got "):
            patches.__getitems__(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [12, -13, 1 << 63, 1 << 64, -(1 << 70), 10**5000], ids=lambda n: f"{n.bit_length()} bits")
def test_items_out_of_range(patches: PatchDataset, images: ImageDataset, n: int) -> None:
    with pytest.raises(IndexError, match="^sample: expected 0 to 11, got "):
        patches[n]
    with pytest.raises(IndexError, match="^sample: expected 0 to 11, got "):
        patches.__getitems__([0, n])
    with pytest.raises(IndexError, match="^image: expected 0 to 4, got "):
        images[n]


def test_iteration_terminates(patches: PatchDataset, images: ImageDataset) -> None:
    assert sum(1 for _ in patches) == 12
    assert sum(1 for _ in images) == len(list(images)) == 5
    assert sum(1 for _ in PatchDataset(patches.shards.folder, 4, 4, length=1)) == 1


def test_names(images: ImageDataset) -> None:
    assert all(name in images for name in images.names)
    assert np.str_("a") in images
    for name in ("A", "", "0", "a.png", "a\0"):
        assert name not in images
    with pytest.raises(KeyError, match="expected the name of one of 5 images, got 'A"):
        images["A\x1b[31m"]
    with pytest.raises(TypeError, match="image: expected a name, got tuple"):
        images[0] in images  # noqa: B015


def test_in_operator_is_refused_for_patches(patches: PatchDataset) -> None:
    """Python's default would draw a whole epoch."""
    with pytest.raises(TypeError, match="PatchDataset does not support `in`"):
        "a" in patches  # noqa: B015


@pytest.mark.parametrize("name", ["scale", "lr_patch", "length", "seed"])
@pytest.mark.parametrize("value", ["2", 24.0, 1e6, 1.5, True, [2], np.float32(2), torch.tensor(2.0)], ids=repr)
def test_arguments_of_the_wrong_type(shards: Path, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name}: expected a whole number, .*, got "):
        PatchDataset(shards, **({"scale": 4, "lr_patch": 4} | {name: value}))
    if name == "scale":
        with pytest.raises(TypeError, match="^scale: expected a whole number, any, got "):
            ImageDataset(shards, value)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8, torch.tensor])
def test_integer_types_as_arguments(shards: Path, kind: Any) -> None:
    data = PatchDataset(shards, scale=kind(4), lr_patch=kind(8), length=kind(9), seed=kind(7))
    data.set_epoch(kind(3))
    plain = PatchDataset(shards, 4, 8, 9, 7)
    plain.set_epoch(3)
    assert data.crop(5) == plain.crop(5)
    assert torch.equal(data[5][1], plain[5][1])
    for name in ("scale", "lr_patch", "seed", "epoch"):
        assert type(getattr(data, name)) is int
    assert type(len(data)) is int
    assert PatchLoader(data, 3).state_dict()["seed"] == 7
    assert torch.equal(ImageDataset(shards, kind(4))[0][0], ImageDataset(shards, 4)[0][0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scale": 0}, ShardsError, r"scale: expected one that was built \(2, 4\), got 0"),
        ({"scale": -4}, ShardsError, r"scale: expected one that was built \(2, 4\), got -4"),
        ({"scale": 1}, ShardsError, r"scale: expected one that was built \(2, 4\), got 1"),
        ({"scale": 1 << 70}, ShardsError, "scale: expected one that was built"),
        ({"lr_patch": 1 << 70}, ValueError, "lr_patch: expected 1 to 1048576, got"),
        ({"lr_patch": -1}, ValueError, "lr_patch: expected 1 to 1048576, got -1"),
        ({"length": 1 << 70}, ValueError, "length: expected 1 to .*, got"),
        ({"seed": 1 << 64}, ValueError, "seed: expected 0 to 18446744073709551615, got"),
        ({"augment": 1}, TypeError, "augment: expected True or False, got 1"),
        ({"augment": "false"}, TypeError, "augment: expected True or False, got 'false'"),
        ({"fixed": None}, TypeError, "fixed: expected True or False, got None"),
        ({"too_small": []}, ValueError, "too_small: expected"),
        ({"folder": ""}, ShardsError, "folder: expected the path of a folder, got ''"),
        ({"folder": "a\0b"}, ShardsError, "folder: expected the path of a folder, got 'a"),
        ({"folder": None}, TypeError, "folder: expected the path of a folder, got None"),
        ({"folder": 3}, TypeError, "folder: expected the path of a folder, got 3"),
        ({"folder": "nowhere\n\x1b[31m"}, FormatError, "expected a dataset, a folder with index.json, got none there"),
    ],
    ids=str,
)
def test_arguments_out_of_range(shards: Path, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"folder": shards, "scale": 4, "lr_patch": 4} | change
    with pytest.raises(error, match=message) as caught:
        PatchDataset(**arguments)
    assert str(caught.value).isprintable()
    if "folder" in change:
        with pytest.raises(error, match=message):
            ImageDataset(change["folder"], 4)


def test_empty_path_is_not_the_working_directory(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Path("")` is the working directory; users must say "."."""
    monkeypatch.chdir(shards)
    assert len(ImageDataset(".", 4)) == 5
    for empty in ("", os.environ.get("SRSHARDS_TEST_UNSET", "")):
        with pytest.raises(ShardsError, match="folder: expected the path of a folder"):
            ImageDataset(empty, 4)


@pytest.mark.parametrize("epoch", [1.0, "1", True, None, 1 << 62, -1])
def test_epochs(shards: Path, epoch: Any) -> None:
    data = PatchDataset(shards, 4, 4)
    with pytest.raises((TypeError, ValueError), match="^epoch: expected .*, got "):
        data.set_epoch(epoch)
    assert data.epoch == 0
    data.set_epoch((1 << 62) - 1)
    assert data.epoch == (1 << 62) - 1
    data[0]


@pytest.mark.parametrize("name", ["scale", "lr_patch", "seed", "augment", "fixed", "plan", "shards", "epoch"])
def test_arguments_are_read_only(patches: PatchDataset, name: str) -> None:
    """Regression: setting `data.seed` changed `state_dict()` but not the samples."""
    before = getattr(patches, name)
    with pytest.raises(AttributeError):
        setattr(patches, name, 3)
    assert getattr(patches, name) is before
    with pytest.raises(AttributeError):
        ImageDataset(patches.shards.folder, 4).scale = 2  # type: ignore[misc]


def test_escape_sequences_in_names_are_escaped(tmp_path: Path) -> None:
    write_image(tmp_path / "in" / "a\x1b[31m\nb\u202e.png", photograph(16, 16))
    out = build(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ShardsError, match="smaller: ") as caught:
        PatchDataset(out, 4, 64)
    assert str(caught.value).isprintable()
    for item in (5, "b\x1b"):
        with pytest.raises((IndexError, KeyError)) as other:
            ImageDataset(out, 4)[item]
        assert str(other.value).isprintable()


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_dataset_moved_before_first_read(shards: Path, tmp_path: Path, monkeypatch: Any, io: str) -> None:
    """Regression: this raised FileNotFoundError from inside the reader."""
    shutil.copytree(shards, tmp_path / "here")
    monkeypatch.setattr("loader.ahead.reader.is_network", lambda folder: io == "pread")
    patches, images = PatchDataset(tmp_path / "here", 4, 4), ImageDataset(tmp_path / "here", 4)
    (tmp_path / "here").rename(tmp_path / "there")
    reads: list[Callable[[], Any]] = [
        lambda: patches[0],
        lambda: images[0],
        lambda: next(iter(PatchLoader(patches, 2))),
    ]
    for read in reads:
        with pytest.raises(FormatError, match=r"here.*: expected .*, got No such file or directory") as caught:
            read()
        assert str(caught.value).isprintable()


def test_dataset_moved_before_unpickling(shards: Path, tmp_path: Path) -> None:
    """The first use raises the error: a worker that fails during unpickling could not report it."""
    shutil.copytree(shards, tmp_path / "here")
    texts = [pickle.dumps(PatchDataset(tmp_path / "here", 4, 4)), pickle.dumps(ImageDataset(tmp_path / "here", 4))]
    (tmp_path / "here").rename(tmp_path / "there")
    for text in texts:
        data = pickle.loads(text)
        for _ in range(2):
            with pytest.raises(FormatError, match="here: expected a dataset, a folder with index.json, got none there"):
                data[0]
        again = pickle.loads(pickle.dumps(data))
        with pytest.raises(FormatError, match="here: expected a dataset"):
            again[0]
    shutil.copytree(tmp_path / "there", tmp_path / "here")
    assert len(pickle.loads(pickle.dumps(data))[0]) == 2
    for path in (tmp_path / "here").iterdir():
        path.unlink()
    write_image(tmp_path / "in/a.png", photograph(64, 64))
    build(tmp_path / "in", tmp_path / "here", scales=(4,))
    for text in texts:
        with pytest.raises(FormatError, match="here: expected the dataset opened before, got one built since"):
            pickle.loads(text)[0]


SPAWNED = """
import sys, shutil
from torch.utils.data import DataLoader
from loader import FormatError, PatchDataset

class Moved(PatchDataset):
    def __getstate__(self):
        shutil.move(self.shards.folder, sys.argv[2])
        return super().__getstate__()

if __name__ == "__main__":
    data = Moved(sys.argv[1], 4, 4)
    try: next(iter(DataLoader(data, 2, num_workers=1, multiprocessing_context="spawn")))
    except FormatError as error: print(str(error).splitlines()[0], "|", str(error).splitlines()[-1])
"""


def test_spawned_worker_reports_to_its_parent(shards: Path, tmp_path: Path) -> None:
    """A FormatError follows the worker's traceback. Regression: the worker died silently."""
    shutil.copytree(shards, tmp_path / "here")
    (tmp_path / "train.py").write_text(SPAWNED)
    run = subprocess.run(
        [sys.executable, str(tmp_path / "train.py"), str(tmp_path / "here"), str(tmp_path / "there")],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert run.stdout.startswith("Caught FormatError in DataLoader worker process 0. | loader.errors.FormatError: ")
    assert run.stdout.endswith("here: expected a dataset, a folder with index.json, got none there\n"), run.stderr


def test_pickles_are_small(shards: Path) -> None:
    """Neither index nor plan is sent to a worker, so size does not depend on the dataset."""
    data, images = PatchDataset(shards, 4, 4, length=1 << 40), ImageDataset(shards, 4)
    data[0], data.plan
    assert "a" in images
    assert len(pickle.dumps(data)) < 800
    assert len(pickle.dumps(images)) < 500
    assert "b" in pickle.loads(pickle.dumps(images))


class Renamed(PatchDataset):
    """A user's subclass."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 4, 4, length=10)
        self.note = "mine"

    def __getitem__(self, n: int) -> Any:
        return (*super().__getitem__(n), self.note)


def test_subclasses(shards: Path) -> None:
    again = pickle.loads(pickle.dumps(Renamed(shards)))
    assert again[3][2] == "mine"
    assert len(list(again)) == 10


def test_file_system_of_a_dead_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(self: Path, **_: Any) -> os.stat_result:
        raise OSError(107, "Transport endpoint is not connected", str(self))

    monkeypatch.setattr(Path, "stat", dead)
    assert storage_module.advice_limit(tmp_path) == storage_module.DEFAULT_READ_AHEAD
    monkeypatch.undo()
    (tmp_path / "loop").symlink_to("loop")
    assert storage_module.file_system(tmp_path / "loop" / "x") == storage_module.file_system(tmp_path)
    assert storage_module.file_system(Path("/proc/self/nowhere")) == "proc"


def test_odd_mount_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = os.path.realpath(tmp_path)
    rows = [
        b"", b" - ", b"1 2 3", b"1 2 0:3 / - ext4 x rw", b"1 2 0:3 / /\\999 rw - tmpfs x rw",
        b"22 1 0:3 / / rw - ext4 /dev/a rw", b"23 1 0:4 / " + os.fsencode(place) + b" rw - fuse.sshfs x rw",
        b"24 1 0:5 / /\xff\\040x rw - nfs x rw", b"\x85\x1c",
    ]  # fmt: skip
    table = b"\n".join(rows).decode("utf-8", "surrogateescape")
    monkeypatch.setattr(Path, "read_text", lambda self, **_: table)
    assert storage_module.file_system(tmp_path) == "fuse.sshfs"
    assert storage_module.is_network(tmp_path)


def test_image_larger_than_memory(images: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def huge(*_: object) -> None:
        raise MemoryError("Unable to allocate 3 TiB")

    monkeypatch.setattr(images.shards, "read", huge)
    with pytest.raises(ShardsError, match="image 'a': expected memory for 128 × 192 pixels, got less"):
        images[0]
