"""A C extension built from other sources than those next to it is ignored, with a warning."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from loader.native import source_mark
from loader.pixels.tiles import gather_kernel

pytestmark = pytest.mark.skipif(gather_kernel is None, reason="the C extensions are not built")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the packages with their C extensions."""
    for name in ("loader", "model", "prep"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def imported(place: Path, name: str) -> str:
    code = f"from loader.native import compiled; print(compiled({name!r}) is not None)"
    words = [sys.executable, "-W", "always", "-c", code]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", ["loader.pixels._gather", "model.cpu._mixing", "loader.resize._imresize"])
def test_extension_of_other_sources_is_ignored(name: str, copy: Path) -> None:
    source = copy / f"{name.replace('.', '/')}.c"
    assert imported(copy, name) == "True\n"
    source.write_bytes(source.read_bytes() + b"/* changed */\n")
    said = imported(copy, name)
    assert said.startswith("False\n")
    assert f"RuntimeWarning: {source.parent}/{source.stem}." in said
    assert "expected a C extension built from the sources next to it, got one of other sources; ignored until" in said
    source.unlink()  # as in an installed wheel
    for header in source.parent.glob("_*.h"):
        header.unlink()
    assert imported(copy, name) == "True\n"


def test_headers_change_the_mark(tmp_path: Path) -> None:
    (tmp_path / "_a.c").write_text("1")
    first = source_mark(tmp_path, "_a")
    (tmp_path / "_a_parts.h").write_text("2")
    second = source_mark(tmp_path, "_a")
    (tmp_path / "_b.c").write_text("3")
    assert len({b"", first, second}) == 3
    assert source_mark(tmp_path, "_a") == second
    assert source_mark(tmp_path, "_c") == b""
