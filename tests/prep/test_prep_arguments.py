"""Odd arguments and streams: empty paths, names of datasets, invalid scales, closed and full standard streams."""

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from helpers import photograph, write_image

from loader.format.index import read_index
from prep.cli import main


def prep(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["build-shards", "", "--scale", "2"],
        ["build-shards", "in", "--scale", "2", "--out", ""],
        ["build-shards", "in", "--scale", "2", "--lr", ""],
        ["info", ""],
        ["bench", ""],
        ["verify", ""],
        ["verify", "in", "--source", ""],
        ["verify", "in", "--source", "in", "--lr", ""],
    ],
)
def test_an_empty_path_does_not_mean_the_working_directory(arguments: list[str]) -> None:
    write_image(Path("in/a.png"), photograph(64, 64))
    result = prep(*arguments)
    assert result.exit_code == 2, result.output
    assert "expected a path, got an empty" in result.output
    assert [path.name for path in Path().iterdir()] == ["in"]


@pytest.mark.parametrize("command", [["bench", "."], ["build-shards", "."]])
@pytest.mark.parametrize("scale", ["0", "-1", "2.0"])
def test_an_invalid_scale_does_not_select_the_default(command: list[str], scale: str) -> None:
    result = prep(*command, "--scale", scale)
    assert result.exit_code == 2
    assert "--scale" in result.output


def test_a_dataset_is_named_after_the_full_folder_name() -> None:
    for name in ("A.v1", "A.v2"):
        write_image(Path(name, f"{name}-0.png"), photograph(64, 64))
        assert prep("build-shards", name, "--scale", 2, "--workers", 1).exit_code == 0
    assert list(read_index(Path("shards/A.v1")).name) == ["A.v1-0"]
    assert list(read_index(Path("shards/A.v2")).name) == ["A.v2-0"]
    assert prep("build-shards", "A.v1/A.v1-0.png", "--scale", 2, "--workers", 1).exit_code == 0
    assert Path("shards/A.v1-0/index.json").exists()
    result = prep("build-shards", "/", "--scale", 2)
    assert result.exit_code != 0


def run(words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a shell command line that starts `prep`."""
    program = f"{sys.executable} -m prep.cli"
    return subprocess.run(
        ["bash", "-c", words.replace("prep ", f"{program} ", 1)], capture_output=True, text=True, check=False,
        timeout=300, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("streams", "workers"), [("2>&-", 2), ("2>/dev/full", 1), ("<&- >&- 2>&-", 1)])
def test_a_build_works_without_standard_streams(streams: str, workers: int) -> None:
    """If closed, no shard gets the descriptor of standard error. If full, messages are dropped."""
    for i in range(4):
        write_image(Path(f"in/{i}.png"), photograph(64, 64, i))
    Path("in/link.png").symlink_to("0.png")  # causes a message
    words = f"prep build-shards in --scale 2 --images-per-shard 1 --workers {workers} --out out {streams}"
    assert run(words).returncode == 0
    assert len(read_index(Path("out")).name) == 5
    assert prep("verify", "out", "--source", "in").exit_code == 0


def test_output_to_full_and_broken_streams() -> None:
    write_image(Path("in/a.png"), photograph(64, 64))
    assert run("prep build-shards in --scale 2 --workers 1 --out out").returncode == 0
    for words in ("prep info out", "prep build-shards in --scale 2 --out out"):
        full = run(f"{words} >/dev/full")
        assert full.returncode == 1
        assert full.stderr == "Error: standard output: No space left on device\n"
        pipe = run(f"set -o pipefail; {words} | true")
        assert pipe.returncode in (0, 128 + 13)  # it may have finished before its reader did
        assert pipe.stderr == ""


def test_a_terminal_that_disappears() -> None:
    """The build continues without its progress bar."""
    for i in range(4):
        write_image(Path(f"in/{i}.png"), photograph(64, 64, i))
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "prep.cli", "build-shards", "in", "--scale", "2", "--workers", "1", "--out", "out"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(words, stderr=theirs, stdout=subprocess.DEVNULL, env=environment, start_new_session=True)
    os.close(theirs)
    os.close(ours)
    assert process.wait(timeout=300) == 0
    assert len(read_index(Path("out")).name) == 4
