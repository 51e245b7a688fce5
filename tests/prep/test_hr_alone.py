"""Datasets without LR: built, read, verified and described like any other; crops need LR, and say so."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import Pixels, build, digests, write_sidecar

from loader import ImageDataset, PatchDataset
from loader.errors import ShardsError
from loader.format.index import read_index
from loader.format.layout import HR, LrOrigin
from loader.pixels.shards import Shards
from loader.stage import copy_dataset
from prep.cli import main


@pytest.fixture(scope="module", params=["hdf5", "raw"])
def alone(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(folder, tmp_path_factory.mktemp("alone") / request.param, scales=(), container=request.param)


def prep(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, list(map(str, words)))
    return done.exit_code, done.output


def test_pixels(alone: Path, pictures: dict[str, Pixels]) -> None:
    shards = Shards(alone)
    assert shards.index.scales == ()
    assert shards.index.lr == LrOrigin("none")
    for number, name in enumerate(shards.index.name):
        assert np.array_equal(shards.read(number, HR), pictures[name])


def test_the_same_command_accepts_it_and_another_does_not(alone: Path, folder: Path) -> None:
    before = digests(alone)
    container = read_index(alone).container
    build(folder, alone, scales=(), container=container)
    with pytest.raises(
        ShardsError, match=r"scale: found none; requested 2\n.*LR: found none; requested matlab-uint8 with"
    ):
        build(folder, alone, scales=(2,), container=container)
    assert digests(alone) == before


def test_crops_and_pairs_need_lr(alone: Path) -> None:
    for kind in (PatchDataset, ImageDataset):
        with pytest.raises(ShardsError, match=r"scale: expected one that was built \(none: HR alone\), got 2"):
            kind(alone, 2)


def test_commands(alone: Path, folder: Path, tmp_path: Path) -> None:
    for words in ((), ("--quick",), ("--source", folder)):
        code, text = prep("verify", alone, *words)
        assert code == 0, text
    code, text = prep("info", alone)
    assert (code, "LR        none\n" in text) == (0, True)
    assert "X2" not in text
    code, text = prep("bench", alone)
    assert code == 1
    assert text.endswith("expected a dataset with LR, whose crops bench reads, got HR alone\n")
    copy_dataset(alone, tmp_path / "copy")
    assert digests(tmp_path / "copy") == digests(alone)


def test_damage_is_found_and_repaired(alone: Path, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(alone, tmp_path / "copy"))
    index = read_index(copy)
    with (copy / index.shards[0].file).open("r+b") as file:
        file.seek(int(index.planes[HR].offset[0]) + 5)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    code, text = prep("verify", copy)
    assert (code, "HR of image 'a'" in text) == (1, True)
    code, text = prep("verify", copy, "--source", folder, "--repair")
    assert (code, digests(copy) == digests(alone)) == (0, True), text


def test_a_build_removes_sidecars_of_the_earlier_index(folder: Path, tmp_path: Path) -> None:
    out = build(folder, tmp_path / "out")
    ours = write_sidecar(out / "scores-kept.bin", read_index(out).sha256, b"1")
    write_sidecar(out / "scores-stale.bin", "0" * 64, b"1")
    (out / "scores-mine.bin").write_text("no sidecar")
    build(folder, out, overwrite=True)  # the same index: its scores still belong to it
    assert (out / "scores-kept.bin").read_bytes() == ours
    assert (out / "scores-mine.bin").read_text() == "no sidecar"
    assert not (out / "scores-stale.bin").exists()
    build(folder, out, overwrite=True, tile=32)
    assert not (out / "scores-kept.bin").exists()
