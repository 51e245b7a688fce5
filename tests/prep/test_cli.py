"""The `prep` command: its output, its default paths, its exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from helpers import photograph, write_image

from loader.format.index import read_index
from prep.cli import main
from prep.console.progress import Progress
from prep.images.sample import PHOTOGRAPHS


def prep(*arguments: object) -> Result:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default paths are relative to the current folder."""
    monkeypatch.chdir(tmp_path)


def test_build_and_info(folder: Path) -> None:
    result = prep("build-shards", folder, "--scale", 4, "--scale", 2, "--scale", 4, "--workers", 1)
    assert result.exit_code == 0, result.output
    out = Path("shards") / folder.name
    assert result.output.startswith(f"{out}: 5 images in 1 shards, ")
    assert sorted(path.name for path in out.iterdir()) == ["index.json", "shard-00000.h5"]
    index = read_index(out)
    assert index.scales == (2, 4)

    facts = json.loads(prep("info", out, "--json").output)
    assert facts["images"] == 5
    assert facts["scales"] == [2, 4]
    assert facts["planes"]["X4"]["tile"] == 32
    assert facts["bytes"] == (out / "shard-00000.h5").stat().st_size
    text = prep("info", out).output
    assert "5 images, a to ü" in text
    assert "64 × 64 to 200 × 300" in text
    assert "made by imresize (matlab-uint8, symmetric border)" in text


def test_default_source(folder: Path) -> None:
    result = prep("build-shards", "--scale", 4)
    assert result.exit_code == 1
    for word in ("datasets/DIV2K/DIV2K_train_HR", "SOURCE", "--sample"):
        assert word in result.output
    Path("datasets/DIV2K").mkdir(parents=True)
    Path("datasets/DIV2K/DIV2K_train_HR").symlink_to(folder)
    assert prep("build-shards", "--scale", 4, "--workers", 1, "--out", "x").exit_code == 0
    assert len(read_index(Path("x")).name) == 5


def test_sample() -> None:
    pytest.importorskip("skimage")
    result = prep("build-shards", "--sample", "--scale", 2, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert sorted(read_index(Path("shards/sample")).name) == sorted(name.split(".")[0] for name in PHOTOGRAPHS)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing option '--scale'"),
        (["none", "--scale", 4], 1, "none: expected a folder of images or an image file, got nothing"),
        ([".", "--scale", 5], 2, "--scale: expected some of 2, 3, 4, 8, got 5"),
        ([".", "--scale", 4, "--tile", 60], 1, "tile: expected a multiple of 16"),
        (["a", "b", "--scale", 4], 2, "--out is required with several SOURCEs"),
        (["a", "--sample", "--scale", 4], 2, "--sample takes neither"),
        ([".", "--scale", 4, "--format", "zip"], 2, "zip"),
        ([".", "--scale", 4, "--lr", "nothing"], 1, "nothing: expected a folder"),
    ],
)
def test_wrong_use(arguments: list[object], code: int, message: str) -> None:
    write_image(Path("picture.png"), photograph(64, 64))
    result = prep("build-shards", *arguments)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert not Path("shards").exists()


def test_bad_images(folder: Path) -> None:
    write_image(Path("in/good.png"), photograph(64, 64))
    Path("in/bad.png").write_text("no image")
    result = prep("build-shards", "in", "--scale", 2, "--workers", 1)
    assert result.exit_code == 1
    assert "in/bad.png: expected PNG" in result.output
    assert not Path("shards/in").exists()
    result = prep("build-shards", "in", "--scale", 2, "--workers", 1, "--on-error", "skip")
    assert result.exit_code == 3
    assert "in/bad.png: expected PNG" in result.output
    assert list(read_index(Path("shards/in")).name) == ["good"]
    result = prep("build-shards", "in", "--scale", 2, "--workers", 1)
    assert result.exit_code == 1
    assert "--overwrite" in result.output


def test_info_needs_a_dataset() -> None:
    for arguments in (["info"], ["info", ".", "--system"]):
        assert prep(*arguments).exit_code == 2
    result = prep("info", ".")
    assert result.exit_code == 1
    assert "expected a dataset" in result.output
    assert json.loads(prep("info", "--system", "--json").output)["kernels"].keys() == {
        "downscaling",
        "gather",
        "network",
    }


def long_build() -> subprocess.Popen[str]:
    """Start a long build with two workers; return once a shard has been started."""
    for i in range(60):
        write_image(Path(f"in/{i}.png"), photograph(600, 600, i % 3))
    command = [sys.executable, "-m", "prep.cli", "build-shards", "in", "--scale", "2", "--scale", "8", "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    # Background jobs of a shell ignore Ctrl-C, and so would the children of these tests.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heed, start_new_session=True
    )
    for _ in range(1000):
        if list(Path().glob("shards/in/shard-*.part")) or process.poll() is not None:
            break
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("whole_group", [False, True])
def test_an_interrupted_build_can_be_resumed(number: int, whole_group: bool) -> None:
    process = long_build()
    (os.killpg if whole_group else os.kill)(process.pid, number)
    output = process.communicate(timeout=60)[1]  # returns once the workers have closed stderr, too
    assert process.returncode == 1
    *state, last = filter(None, output.splitlines())
    assert last == "Aborted!"
    assert len(state) <= 1, output
    if state:
        assert state[0].endswith("of 8 shards are finished; run the same command to resume")
        assert not list(Path("shards/in").glob("*.part"))
        assert not Path("shards/in/index.json").exists()
    else:
        assert not Path("shards/in").exists()


def test_a_killed_build_is_no_dataset_and_can_be_resumed() -> None:
    process = long_build()
    process.kill()
    process.communicate(timeout=60)
    assert list(Path("shards/in").glob("shard-*.part"))
    assert prep("info", "shards/in").exit_code == 1
    other = prep("build-shards", "in", "--scale", 2, "--workers", 2)
    assert other.exit_code == 1
    assert "scale: found 2, 8; requested 2" in other.output
    assert prep("build-shards", "in", "--scale", 2, "--scale", 8, "--workers", 2).exit_code == 0
    assert {path.suffix for path in Path("shards/in").iterdir()} == {".json", ".h5"}
    assert not list(Path("shards/in").glob("build*"))
    assert len(read_index(Path("shards/in")).name) == 60
    again = prep("build-shards", "in", "--scale", 2, "--scale", 8)
    assert again.exit_code == 0
    assert "already complete; all checksums match: 60 images" in again.output


def test_progress_lines(capsys: pytest.CaptureFixture[str]) -> None:
    now = iter([0.0, 4.0, 11.0, 12.0])
    with Progress(100, "image", clock=lambda: next(now)) as progress:
        for done in (10, 50, 60):
            progress(done)
    assert capsys.readouterr().err == "50/100 images, 11 s, 4.5 images/s, 11 s left\n"


@pytest.mark.parametrize("container", ["hdf5", "raw"])
@pytest.mark.parametrize("limit", [10_000, 150_000])
def test_a_full_disk(folder: Path, container: str, limit: int) -> None:
    """A limit on file size stands in for a full disk: writes fail halfway, and so does closing."""
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"from prep.cli import main; main(['build-shards', {str(folder)!r}, '--scale', '2', '--workers', '1', "
        f"'--format', {container!r}, '--out', 'out'])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1, run.stderr
    assert "could not be written: File too large" in run.stderr
    assert not Path("out").exists()


def test_an_unexpected_system_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", f"{folder}/\x1b[31m")

    monkeypatch.setattr("prep.commands.info.describe_dataset", fail)
    result = prep("info", "x")
    assert result.exit_code == 1
    assert result.output == "Error: x/\\x1b[31m: Permission denied\n"


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("maximum"), OverflowError("too large")])
def test_resource_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(folder: Path) -> None:
        raise error

    monkeypatch.setattr("prep.commands.info.describe_dataset", fail)
    result = prep("info", "x")
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert result.output.count("\n") == 1
