"""Concurrency: several builds in one folder, and readers of a dataset being replaced."""

import errno
import fcntl
import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import Build, digests
from helpers import build as typed_build

import prep.workspace.lock
from loader.dataset import PatchDataset
from loader.errors import FormatError, ShardsError
from loader.format.index import read_index
from prep.workspace.lock import LockMode
from prep.workspace.workspace import Workspace

build: Build = typed_build
LOCK = Workspace(Path()).lock.name


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Run code with arguments in another process."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


HOLD = """
import sys
from pathlib import Path
from prep.workspace.lock import LockMode
from prep.workspace.workspace import Workspace
if sys.argv[2] in ("WHOLE", "PART"):
    with Workspace(Path(sys.argv[1])).locked(print, LockMode[sys.argv[2]]):
        print("held", flush=True)
        sys.stdin.read()
else:
    Workspace(Path(sys.argv[1])).join_lock()
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    """Hold a folder's lock in another process: as a whole build, a part of one, or a worker."""
    with python(HOLD, folder, kind) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_build_is_refused_until_the_first_ends(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with holder(out, "WHOLE") as process:
        got = rf"process {process.pid} on .+, since \d+-\d+-\d+ .*"
        with pytest.raises(
            ShardsError, match=rf"{re.escape(str(out))}: expected no other build at work there, got {got}"
        ):
            build(folder, out)
        assert [path.name for path in out.iterdir()] == [LOCK]
        process.kill()
        process.wait()
        build(folder, out)
    assert digests(out) == digests(build(folder, tmp_path / "undisturbed"))


def test_a_build_waits_for_the_workers_of_a_killed_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / LOCK).touch()
    with holder(out, "worker") as process:
        monkeypatch.setattr(prep.workspace.lock, "PATIENCE", 0.1)
        with pytest.raises(ShardsError, match="expected no other build at work there"):
            build(folder, out)
        monkeypatch.setattr(prep.workspace.lock, "PATIENCE", 60.0)
        threading.Timer(0.2, process.kill).start()
        build(folder, out)
        assert process.wait() < 0
    assert not (out / LOCK).exists()


def test_parts_share_the_lock_but_a_whole_build_does_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prep.workspace.lock, "PATIENCE", 0.1)
    out = tmp_path / "out"
    out.mkdir()
    workspace = Workspace(out)
    with holder(out, "PART"), holder(out, "worker"):  # the part's worker: other parts do not wait for it
        with holder(out, "PART"), workspace.locked(print, LockMode.PART):
            pass
        assert workspace.lock.exists()  # another part still holds it
        with pytest.raises(ShardsError, match="expected no other build at work there, got process"):
            build(folder, out)
    with (
        holder(out, "WHOLE"),
        pytest.raises(ShardsError, match="expected no other build at work there, got process"),
        workspace.locked(print, LockMode.PART),
    ):
        pass
    with workspace.locked(print, LockMode.PART):
        pass
    assert not workspace.lock.exists()
    assert digests(build(folder, out)) == digests(build(folder, tmp_path / "undisturbed"))


def test_a_part_waits_for_a_whole_build_to_end(tmp_path: Path) -> None:
    with holder(tmp_path, "WHOLE") as process:
        threading.Timer(0.2, process.kill).start()
        with Workspace(tmp_path).locked(print, LockMode.PART):
            assert process.wait() < 0
    assert not list(tmp_path.iterdir())


def test_the_first_part_waits_for_the_workers_of_a_killed_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Workspace(tmp_path).lock.touch()
    with holder(tmp_path, "worker"):
        monkeypatch.setattr(prep.workspace.lock, "PATIENCE", 0.1)
        with (
            pytest.raises(ShardsError, match="expected no other build at work there"),
            Workspace(tmp_path).locked(print, LockMode.PART),
        ):
            pass


def test_without_locks_a_build_continues_with_a_message(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    notes: list[str] = []
    build(folder, tmp_path / "out", note=notes.append)
    assert notes == [f"{tmp_path / 'out'}: this file system has no locks: make sure that no other build writes here"]
    assert not (tmp_path / "out" / LOCK).exists()


TAKE_TURNS = """
import os, sys, time
from pathlib import Path
from loader.errors import ShardsError
from prep.workspace.lock import LockMode
from prep.workspace.workspace import Workspace
folder, taken, refused = Path(sys.argv[1]), 0, 0
(folder.parent / str(os.getpid())).touch()
while len(list(folder.parent.iterdir())) < 4:  # all start together
    time.sleep(0.001)
while taken < 50:
    try:
        with Workspace(folder).locked(print, LockMode[sys.argv[2]]):
            if sys.argv[2] == "PART":
                (folder / f"part-{os.getpid()}").touch()
                time.sleep(0.001)
                (folder / f"part-{os.getpid()}").unlink()
                taken += 1
                continue
            assert not list(folder.glob("part-*"))
            os.close(os.open(folder / "alone", os.O_CREAT | os.O_EXCL))
            time.sleep(0.001)
            os.unlink(folder / "alone")
            taken += 1
    except ShardsError:
        refused += 1
print(refused)
"""


@pytest.mark.parametrize("modes", ["WHOLE WHOLE WHOLE", "PART PART WHOLE", "PART PART PART"])
def test_the_lock_excludes_while_its_file_comes_and_goes(tmp_path: Path, modes: str) -> None:
    """One whole build holds it, or parts only."""
    (tmp_path / "locked").mkdir()
    processes = [python(TAKE_TURNS, tmp_path / "locked", mode) for mode in modes.split()]
    refused = 0
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
        refused += int(output)
    assert refused or "PART" in modes
    assert not list((tmp_path / "locked").iterdir())


BUILD = "import sys; from prep.cli import main; main(['build-shards', *sys.argv[1:]])"


def test_racing_builds(folder: Path, tmp_path: Path) -> None:
    words = ("--scale", 2, "--scale", 4, "--images-per-shard", 2, "--workers", 2, "--out", tmp_path / "out")
    processes = [python(BUILD, folder, *words) for _ in range(3)]
    ended = [(process.communicate(timeout=120), process.returncode) for process in processes]
    assert 0 in [code for _, code in ended]
    for (output, errors), code in ended:
        if code:
            assert re.search("expected no other build at work there, got (process|one that has just started)", errors)
            assert errors.count("\n") == 1
        else:
            assert re.match(r".*: (already complete; all checksums match: )?5 images in 3 shards", output), errors
    assert digests(tmp_path / "out") == digests(build(folder, tmp_path / "undisturbed"))


def test_readers_see_the_old_dataset_the_new_one_or_none(folder: Path, tmp_path: Path) -> None:
    """Both have shards of the same names and lengths; only the outermost LR pixels differ."""
    out = tmp_path / "out"

    def samples(place: Path) -> str:
        data = PatchDataset(place, scale=4, lr_patch=16, length=12)
        return hashlib.sha256(b"".join(part.numpy().tobytes() for i in range(12) for part in data[i])).hexdigest()

    borders = ("symmetric", "replicate")
    made = {samples(build(folder, tmp_path / border, border=border)): border for border in borders}
    assert len(made) == 2
    assert len({tuple(shard.bytes for shard in read_index(tmp_path / border).shards) for border in borders}) == 1
    failed: list[BaseException] = []

    def rebuild() -> None:
        try:
            for i in range(12):
                build(folder, out, border=borders[i % 2], overwrite=True)
        except BaseException as error:
            failed.append(error)

    builder = threading.Thread(target=rebuild)
    builder.start()
    seen = {"none": 0, "symmetric": 0, "replicate": 0}
    while builder.is_alive():
        try:
            seen[made[samples(out)]] += 1
        except FormatError:
            seen["none"] += 1
    assert not failed
    assert seen["symmetric"], seen
    assert seen["replicate"], seen
