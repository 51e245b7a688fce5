"""`verify` on hostile datasets: it terminates, opens nothing outside the folder, and escapes what it prints."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers import build

import loader.system.safefile
import prep.shard.hdf5
import prep.verify.sources
from loader.errors import ShardsError
from loader.format.index import read_index
from loader.format.index_text import dump_index
from loader.format.layout import HR, Index
from prep.cli import main
from prep.shard.checksums import HOLE, _sparse, check_shard
from prep.shard.hdf5 import check_hdf5

PRIVATE = "private facts"


def verify(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["verify", *map(str, arguments)])
    assert "Traceback" not in result.output
    assert result.exit_code != 1 or isinstance(result.exception, SystemExit), result.exception
    assert all(line.isprintable() for line in result.output.splitlines() if "shard" in line), result.output
    return result


@contextmanager
def watchdog(seconds: int = 120) -> Iterator[None]:
    """Interrupt whatever blocks on a pipe, including libhdf5."""

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def in_time(*arguments: object) -> Result:
    with watchdog():
        return verify(*arguments)


def verify_process(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run `prep verify` in its own process, with a timeout."""
    return subprocess.run(
        [sys.executable, "-m", "prep.cli", "verify", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    shutil.copytree(dataset, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def hdf5(folder: Path, tmp_path: Path) -> Path:
    return build(folder, tmp_path / "data", images_per_shard=9)


def rewrite(folder: Path, index: Index) -> None:
    """Write an index that records the shards as they are now."""
    shards = []
    for shard in index.shards:
        data = (folder / shard.file).read_bytes()
        shards.append(replace(shard, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    (folder / "index.json").write_bytes(dump_index(replace(index, shards=tuple(shards), sha256="")))


def claim(folder: Path, length: int, number: int = 0) -> Path:
    """Make the index claim a length for a shard; return the shard's path."""
    index = read_index(folder)
    shards = list(index.shards)
    shards[number] = replace(shards[number], bytes=length)
    (folder / "index.json").write_bytes(dump_index(replace(index, shards=tuple(shards), sha256="")))
    return folder / shards[number].file


def test_index_claiming_an_absurd_length(copy: Path) -> None:
    path = claim(copy, 1 << 62)
    ended = verify_process(copy)
    assert ended.returncode == 1
    assert (ended.stdout + ended.stderr).startswith((f"{path}: ", "Error: "))
    assert "Traceback" not in ended.stderr


def test_sparse_shard_of_an_absurd_length(copy: Path) -> None:
    path = claim(copy, 1 << 42)
    try:
        os.truncate(path, 1 << 42)
    except OSError:
        pytest.skip("this file system does not support such long files")
    ended = verify_process(copy)
    assert ended.returncode == 1
    assert "expected " in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def test_holes_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(bytes(5000))
        os.truncate(path, 3 << 40)
        assert _sparse(file.fileno()) is None or "a hole of" in str(_sparse(file.fileno()))
        os.truncate(path, HOLE)
        assert _sparse(file.fileno()) is None
    small = tmp_path / "small"
    small.write_bytes(b"x" * 9000)
    descriptor = os.open(small, os.O_RDONLY)
    assert _sparse(descriptor) is None
    os.close(descriptor)


def test_truncated_shard_names_every_missing_plane(copy: Path) -> None:
    index = read_index(copy)
    path = copy / index.shards[0].file
    os.truncate(path, 0)
    findings = check_shard(copy, index, 0, lambda: None)
    planes = int((index.shard == 0).sum()) * len(index.planes)
    assert [("end of the file" in finding.text, finding.image is None) for finding in findings] == [
        (False, True), *[(True, False)] * planes,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to device", "link outside", "link to a pipe", "broken link"])
def test_something_else_in_place_of_a_shard(copy: Path, folder: Path, dataset: Path, tmp_path: Path, kind: str) -> None:
    """verify reports it, and --repair replaces it unless it is a folder. Nothing blocks on a pipe."""
    path = copy / read_index(copy).shards[0].file
    outside = tmp_path / "outside"
    path.rename(outside)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "link to device":
            path.symlink_to("/dev/zero")
        case "link outside":
            path.symlink_to(outside)
        case "link to a pipe":
            os.mkfifo(copy / "pipe")
            path.symlink_to("pipe")
        case _:
            path.symlink_to("nowhere")
    before = outside.read_bytes()
    for arguments in ([], ["--quick"]):
        ended = in_time(copy, *arguments)
        assert ended.exit_code == 1
        assert ended.stdout.startswith(f"{path}: "), ended.stderr
        assert ended.stdout.count("\n") == 2
    ended = in_time(copy, "--repair", "--source", folder)
    assert ended.exit_code == (1 if kind == "folder" else 0), ended.stdout
    if kind != "folder":
        assert path.read_bytes() == (dataset / path.name).read_bytes()
        assert not path.is_symlink()
    assert outside.read_bytes() == before


def test_link_within_the_folder_is_followed(copy: Path) -> None:
    path = copy / read_index(copy).shards[0].file
    path.rename(copy / "store")
    path.symlink_to("store")
    assert verify(copy).exit_code == 0


def test_planted_repair_folder(copy: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("kept")
    path = copy / read_index(copy).shards[0].file
    for plant in (lambda p: p.symlink_to(tmp_path / "theirs"), lambda p: os.mkfifo(p), lambda p: p.write_text("x")):
        plant(copy / "repair.part")
        os.truncate(path, 5000)
        assert verify(copy, "--repair", "--source", folder).exit_code == 0
        assert not os.path.lexists(copy / "repair.part")
        assert [file.name for file in (tmp_path / "theirs").iterdir()] == ["file"]


Edit = Callable[[h5py.File, Path], None]


def external_link(file: h5py.File, other: Path) -> None:
    del file["HR/a"]
    file["HR/a"] = h5py.ExternalLink(str(other), "/pixels")


def external_link_to_a_pipe(file: h5py.File, other: Path) -> None:
    del file["HR/a"]
    file["HR/a"] = h5py.ExternalLink(str(other.with_name("pipe")), "/pixels")


def external_group(file: h5py.File, other: Path) -> None:
    del file["LR_bicubic"]
    file["LR_bicubic"] = h5py.ExternalLink(str(other), "/group")


def external_inner_group(file: h5py.File, other: Path) -> None:
    del file["LR_bicubic/X4"]
    file["LR_bicubic/X4"] = h5py.ExternalLink(str(other), "/group")


def soft_link(file: h5py.File, other: Path) -> None:
    file.move("HR/a", "hidden")
    file["HR/a"] = h5py.SoftLink("/hidden")


def soft_link_to_itself(file: h5py.File, other: Path) -> None:
    del file["HR/a"]
    file["HR/a"] = h5py.SoftLink("/HR/a")


def soft_group(file: h5py.File, other: Path) -> None:
    file.move("HR", "hidden")
    file["HR"] = h5py.SoftLink("/hidden")


def virtual(file: h5py.File, other: Path) -> None:
    shape = file["HR/a"].shape
    del file["HR/a"]
    layout = h5py.VirtualLayout(shape, np.uint8, maxshape=(None, *shape[1:]))
    source = h5py.VirtualSource(str(other.with_name("pipe")), "pixels", shape, np.uint8, maxshape=(None, *shape[1:]))
    layout[: h5py.h5s.UNLIMITED] = source[: h5py.h5s.UNLIMITED]
    file.create_virtual_dataset("HR/a", layout)


def external_storage(file: h5py.File, other: Path) -> None:
    shape = file["HR/a"].shape
    del file["HR/a"]
    place = [(str(other.with_name("pipe")), 0, h5py.h5f.UNLIMITED)]
    file.create_dataset("HR/a", shape, np.uint8, external=place)


def group(file: h5py.File, other: Path) -> None:
    del file["HR/a"]
    file.create_group("HR/a")


def committed_type(file: h5py.File, other: Path) -> None:
    del file["HR/a"]
    file["HR/a"] = np.dtype(np.uint8)


def reference(file: h5py.File, other: Path) -> None:
    place = file["HR/b"].ref
    del file["HR/a"]
    file.create_dataset("HR/a", (128, 192, 3), h5py.ref_dtype, chunks=(64, 64, 3))[0, 0, 0] = place


EDITS = [external_link, external_link_to_a_pipe, external_group, external_inner_group, soft_link, soft_link_to_itself,
         soft_group, virtual, external_storage, group, committed_type, reference]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_hdf5_links_are_not_followed(hdf5: Path, tmp_path: Path, edit: Edit) -> None:
    """Only hard links to ordinary datasets are followed; nothing else is opened."""
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["pixels"] = np.zeros((7, 7), np.uint8)
        file.create_group(f"group/{PRIVATE}")
    os.mkfifo(tmp_path / "pipe")
    index = read_index(hdf5)
    with h5py.File(hdf5 / index.shards[0].file, "r+") as file:
        edit(file, other)
    rewrite(hdf5, index)
    ended = in_time(hdf5, "--quick")
    assert ended.exit_code == 1
    assert "expected " in ended.stdout
    assert PRIVATE not in ended.stdout
    assert "(7, 7)" not in ended.stdout
    if "link" in edit.__name__ or edit in (external_group, external_inner_group, soft_group):
        kind = "a soft link" if "soft" in edit.__name__ else "an external link"
        assert f"({kind}, which is not followed)" in ended.stdout
    if edit in (virtual, external_storage):
        assert "(one whose pixels are in other files)" in ended.stdout


def test_shard_replaced_by_a_pipe_after_opening(hdf5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libhdf5 reads the open file, whatever its name leads to by then."""
    index = read_index(hdf5)
    path = hdf5 / index.shards[0].file
    real = loader.system.safefile.open_member

    def open_and_replace(name: Path) -> int:
        descriptor = real(name)
        name.unlink()
        os.mkfifo(name)
        return descriptor

    monkeypatch.setattr(prep.shard.hdf5, "open_member", open_and_replace)
    with watchdog():
        findings = list(check_hdf5(hdf5, index, 0))
    assert all("cannot be opened" in finding.text for finding in findings)
    assert path.is_fifo()


def test_names_with_escape_sequences(copy: Path) -> None:
    """In every string of a hostile index: program, images, sources."""
    index = read_index(copy)
    name = "\x1b]0;owned\x07\x1b[2J\n\u202e"
    names = [name, *list(index.name)[1:]]
    plane = index.planes[HR]
    from loader.format.layout import Strings

    source = Strings([f"{name}/{i}.png" for i in range(len(names))])
    changed = replace(
        index, made_by=name, name=Strings(names), sha256="",
        planes=index.planes | {HR: replace(plane, source=source, crc32=plane.crc32 ^ 1)},
    )  # fmt: skip
    (copy / "index.json").write_bytes(dump_index(changed))
    for arguments in ([], ["--source", copy]):
        result = verify(copy, *arguments)
        assert result.exit_code == 1
        assert all(line.isprintable() for line in result.output.splitlines())


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES])
@pytest.mark.parametrize("call", ["stat", "read"])
def test_failing_storage_is_not_a_changed_source(
    dataset: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    """Sources on a dead mount are reported as not compared: neither as changed or missing, nor as matching."""

    def failure(path: Path) -> OSError:
        return OSError(code, os.strerror(code), str(path))

    if call == "read":

        def opened(path: Path) -> int:
            raise failure(path)

        monkeypatch.setattr(prep.verify.sources, "open_named", opened)
    else:
        stat = Path.stat

        def looked_at(self: Path, *, follow_symlinks: bool = True) -> os.stat_result:
            if self.is_relative_to(folder):
                raise failure(self)
            return stat(self, follow_symlinks=follow_symlinks)

        monkeypatch.setattr(Path, "stat", looked_at)
    result = verify(dataset, "--source", folder)
    assert result.exit_code == 1
    *lines, last = result.stdout.splitlines()
    assert len(lines) == 5
    assert all(f"could not be read: {os.strerror(code)}" in line for line in lines)
    assert "changed since" not in result.stdout
    assert last.endswith(": no damage found; 5 images could not be compared")


def test_one_of_several_sources_fails(dataset: Path, folder: Path, tmp_path: Path) -> None:
    """An unreadable file does not matter if the right one is found elsewhere."""
    (tmp_path / "first").mkdir()
    for path in folder.iterdir():
        os.mkfifo(tmp_path / "first" / path.name)
    assert verify(dataset, "--source", tmp_path / "first", "--source", folder).exit_code == 0


def test_empty_arguments(dataset: Path) -> None:
    """An unset shell variable does not mean the working directory."""
    for words in (["verify", ""], ["verify", dataset, "--source", ""], ["bench", ""]):
        result = CliRunner().invoke(main, list(map(str, words)))
        assert result.exit_code == 2
        assert "an unset shell variable?" in result.output


def test_repair_with_unreadable_sources(copy: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copy / read_index(copy).shards[0].file
    os.truncate(path, 5000)

    def opened(source: Path) -> int:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(source))

    monkeypatch.setattr(prep.verify.sources, "open_named", opened)
    result = verify(copy, "--repair", "--source", folder)
    assert result.exit_code == 1
    assert f"{path}: not repaired: " in result.stdout
    assert path.stat().st_size == 5000
    with pytest.raises(ShardsError):
        read_index(copy)
