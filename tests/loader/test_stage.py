"""Copying a dataset, and nothing but a dataset."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from helpers import digests, write_sidecar

from loader import stage
from loader.errors import ShardsError
from loader.format.index import read_index
from loader.stage import copy_dataset


@pytest.fixture
def source(dataset: Path, tmp_path: Path) -> Path:
    """A dataset of its own, its folder's name an odd one."""
    return Path(shutil.copytree(dataset, tmp_path / "-a dataset\nü"))


def test_what_is_copied(source: Path, tmp_path: Path) -> None:
    (source / "skipped.json").write_text(json.dumps([]))
    expected = digests(source)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (source / "notes.txt").write_text("notes")
    (source / "link").symlink_to(secret)
    (source / "all").symlink_to(tmp_path)
    os.mkfifo(source / "build.lock")
    target = tmp_path / "new" / "copy"
    assert copy_dataset(source, target) == sum((source / name).stat().st_size for name in expected)
    assert digests(target) == expected
    assert not [path for path in target.iterdir() if path.is_symlink()]
    assert target.stat().st_mode & 0o777 == 0o700
    assert read_index(target).sha256 == read_index(source).sha256


def test_sidecars_of_this_index_are_copied(source: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.bin"
    ours = write_sidecar(source / "scores-detail.bin", read_index(source).sha256, b"scores")
    write_sidecar(source / "scores-stale.bin", "0" * 64, b"scores")
    write_sidecar(outside, read_index(source).sha256, b"secret")
    (source / "scores-link.bin").symlink_to(outside)
    (source / "scores-text.bin").write_text("scores")
    os.mkfifo(source / "scores-pipe.bin")
    copy_dataset(source, tmp_path / "copy")
    copied = sorted(path.name for path in (tmp_path / "copy").glob("scores-*"))
    assert copied == ["scores-detail.bin"]
    assert (tmp_path / "copy/scores-detail.bin").read_bytes() == ours


@pytest.mark.parametrize("name", ["skipped.json", "index.json", "shard"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_is_followed_out_of_the_folder(source: Path, tmp_path: Path, name: str, kind: str) -> None:
    path = source / (read_index(source).shards[0].file if name == "shard" else name)
    if name == "skipped.json":
        path.write_text("[]")
    outside = path.rename(tmp_path / "outside")
    if kind == "link":
        path.symlink_to(outside)
    else:
        os.mkfifo(path)
    with pytest.raises((ShardsError, OSError), match=r"a link to|pipe|regular file"):
        copy_dataset(source, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_there_must_be_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = namedtuple("room", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: room(5))
    with pytest.raises(ShardsError, match=r"(?s)copy: expected room for the \d+ bytes of .*, got 5$"):
        copy_dataset(source, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_what_is_there_stays(source: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "mine").touch()
    with pytest.raises(FileExistsError):
        copy_dataset(source, tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["mine"]


def test_a_dataset_that_changes_meanwhile_is_not_copied(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stage._copy

    def copy_and_change(one: Path, other: Path) -> int:
        text = (source / "index.json").read_bytes()
        length = whole(one, other)
        if one.name == "index.json":
            other.write_bytes(text[:-5])
        return length

    monkeypatch.setattr(stage, "_copy", copy_and_change)
    with pytest.raises(ShardsError):
        copy_dataset(source, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_failure_is_one_line(source: Path, tmp_path: Path) -> None:
    (source / "index.json").unlink()
    words = [sys.executable, "-m", "loader.stage", "--", source.name, str(tmp_path / "copy")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith(": -a dataset\\nü: expected a dataset, a folder with index.json, got none there\n")
    assert done.stderr.count("\n") == 1


def test_a_full_disk_names_the_file(source: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "loader.stage", "--", source.name, "copy"]
    limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 8; exec "$@"', "bash", *words]
    done = subprocess.run(limited, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert ": copy/shard-00000." in done.stderr
    assert done.stderr.endswith(": File too large\n")
    assert not (tmp_path / "copy").exists()
