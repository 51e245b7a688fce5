"""Installed commands run in folders with a user's own `model/`, `loader/` or `random.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import photograph, write_image

import srshards_names

ROOT = Path(srshards_names.__file__).resolve().parent
PREP = str(Path(sys.executable).with_name("prep"))
PYTHON = sys.executable


def run(words: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(
        words, cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=300, check=False
    )


def foreign(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("print('foreign')\n")


def test_plain_folders_do_not_shadow_packages(tmp_path: Path) -> None:
    for name in ("loader", "model", "prep", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").touch()
    for words in ([PYTHON, "-m", "model.curves", "--help"], [PYTHON, "-m", "prep.cli", "--help"], [PREP, "--help"]):
        for environment in ({}, {"PYTHONPATH": "."}):
            done = run(words, tmp_path, **environment)
            assert (done.returncode, done.stderr) == (0, ""), words


def test_build_imports_nothing_from_the_working_directory(tmp_path: Path) -> None:
    """Neither in the command nor in its worker processes, which start as `python -c`."""
    for i in range(3):
        write_image(tmp_path / "images" / f"{i}.png", photograph(32, 32, seed=i))
    foreign(tmp_path, "loader", "model", "prep", "numpy", "multiprocessing")
    for name in ("random", "signal", "struct", "tempfile", "subprocess", "selectors", "threading", "train"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken from the working directory')\n")
    words = [PREP, "build-shards", "images", "--scale", "2", "--workers", "2", "--images-per-shard", "1", "--out", "x"]
    done = run(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "foreign" not in done.stdout
    assert "working directory" not in done.stderr
    assert (tmp_path / "x" / "index.json").exists()


@pytest.mark.parametrize(
    ("words", "hidden"),
    [
        ([PYTHON, "-m", "model.curves"], "loader"),
        ([PYTHON, "-m", "model.curves"], "prep"),
        ([PYTHON, "-m", "prep.cli"], "loader"),
        ([PYTHON, "-X", "utf8", "-m", "model.curves"], "loader"),
    ],
)
def test_shadowed_package_is_one_line(words: list[str], hidden: str, tmp_path: Path) -> None:
    foreign(tmp_path, hidden)
    done = run([*words, "--help"], tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    expected = f"Error: expected the package {hidden} of srshards, {ROOT / hidden}, got {tmp_path.resolve() / hidden};"
    assert done.stderr.startswith(expected)
    assert done.stderr.count("\n") == 1
    assert run([words[0], "-P", *words[1:], "--help"], tmp_path).returncode == 0  # as the message advises


def test_package_shadowed_through_pythonpath(tmp_path: Path) -> None:
    """By a module, with the installed script."""
    (tmp_path / "loader.py").write_text("print('foreign')\n")
    done = run([PREP, "--help"], tmp_path, PYTHONPATH=".")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"got {tmp_path.resolve() / 'loader.py'}; start from another folder" in done.stderr
    assert done.stderr.count("\n") == 1


def test_programs_with_their_own_packages_still_work(tmp_path: Path) -> None:
    """Their `prep` and `model` with our loader; their `loader` with our model and prep."""
    foreign(tmp_path, "prep", "model")
    (tmp_path / "own.py").write_text("import prep, model, loader.format.layout; print(loader.format.layout.__file__)\n")
    done = run([PYTHON, "own.py"], tmp_path)
    assert (done.stdout, done.stderr) == (f"foreign\nforeign\n{ROOT / 'loader' / 'format' / 'layout.py'}\n", "")
    other = tmp_path / "other"
    other.mkdir()
    foreign(other, "loader", "mine")
    (other / "mine" / "__init__.py").write_text("import model\n")
    (other / "mine" / "train.py").write_text("import prep; print(prep.__file__)\n")
    done = run([PYTHON, "-m", "mine.train"], other)
    assert (done.stdout, done.stderr) == (f"{ROOT / 'prep' / '__init__.py'}\n", "")
