"""Sidecars: recognised by name and header, and bound to one index."""

import random
from pathlib import Path

import pytest
from fuzzing import EDGES, mutated
from helpers import write_sidecar

from loader.format.sidecar import sidecars

DIGEST = "ab" * 32


def test_sidecars_tell_their_index(tmp_path: Path) -> None:
    write_sidecar(tmp_path / "scores-detail.bin", DIGEST, b"\0\1\2")
    write_sidecar(tmp_path / "scores-a_B-9.bin", "0" * 64, b"")
    (tmp_path / "scores-folder.bin").mkdir()
    assert sidecars(tmp_path) == {"scores-a_B-9.bin": "0" * 64, "scores-detail.bin": DIGEST}


@pytest.mark.parametrize(
    "name",
    ["scores-.bin", "scores--x.bin", "scores-a.b.bin", "scores-x.bin.part", "scores-ü.bin", f"scores-{'x' * 65}.bin"],
)
def test_other_names(tmp_path: Path, name: str) -> None:
    write_sidecar(tmp_path / name, DIGEST, b"")
    assert sidecars(tmp_path) == {}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"srshards-scores"', b'"srshards-others"'),
        (DIGEST.encode(), DIGEST[:-1].encode() + b"g"),
        (b'"index"', b'"other"'),
        (b"{", b"["),
        (b"\n", b" "),
        (b" \n", b"\n"),
    ],
)
def test_other_headers(tmp_path: Path, old: bytes, new: bytes) -> None:
    text = write_sidecar(tmp_path / "scores-x.bin", DIGEST, b"")
    assert text.count(old) == 1
    (tmp_path / "scores-x.bin").write_bytes(text.replace(old, new))
    assert sidecars(tmp_path) == {}


def test_random_headers_are_ignored_or_name_an_index(tmp_path: Path) -> None:
    text, found = write_sidecar(tmp_path / "scores-x.bin", DIGEST, b"\0\1\2"), 0
    words = [*EDGES, b'"', b"[" * 3000, b"{", b"}", b"9" * 5000, b"1e9", b"null", b'"\\ud800"', b"\xff"]
    for n in range(300):
        (tmp_path / "scores-x.bin").write_bytes(mutated(text, random.Random(n), words))
        for digest in sidecars(tmp_path).values():
            assert len(digest) == 64
            found += 1
    assert 0 < found < 300
