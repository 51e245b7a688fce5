"""Files planted in a build's folder by another user: links, pipes, hard links, forged records.

Nothing outside the folder is touched, nothing blocks, and nothing planted becomes part of the dataset.
"""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import Build, digests, photograph, write_image
from helpers import build as typed_build

import loader.system.safefile
import prep.workspace.trust
from loader.errors import FormatError, ShardsError
from loader.format.index import read_index
from loader.system.safefile import UnsafeFileError, open_own
from prep.cli import main
from prep.sealed import seal
from prep.shard.writers import open_writer
from prep.workspace.trust import other_writers
from prep.workspace.workspace import PART, RECORD, Workspace

build: Build = typed_build
BUILD, LOCK, SKIPPED = (
    path.name for path in (Workspace(Path()).manifest, Workspace(Path()).lock, Workspace(Path()).skipped)
)
PRECIOUS = b"of somebody else, and not to be touched"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file outside the folder."""
    path = tmp_path / "victim"
    path.write_bytes(PRECIOUS)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for a dataset."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture(params=["hdf5", "raw"])
def one_each(request: pytest.FixtureRequest) -> Build:
    """`build` with one image per shard, in each container."""

    def run(source: Path, out: Path, **changes: object) -> Path:
        return build(source, out, **({"container": request.param, "images_per_shard": 1} | changes))

    return run


def stopped(run: Build, source: Path, out: Path) -> Path:
    """Interrupt a build with three shards finished; return its folder."""

    def report(done: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, out, report=report)
    return out


def plant(path: Path, kind: str, victim: Path) -> None:
    """Replace a file by something else."""
    path.unlink(missing_ok=True)
    match kind:
        case "link":
            path.symlink_to(Path("..") / victim.name)
        case "dangling link":
            path.symlink_to(victim.with_name("made"))
        case "link to a device":
            path.symlink_to("/dev/zero")
        case "second name":
            path.hardlink_to(victim)
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "sparse file":
            path.touch()
            os.truncate(path, 1 << 40)
        case _:
            path.write_bytes(b"[" * 200_000)


KINDS = ["link", "dangling link", "link to a device", "second name", "pipe", "folder", "sparse file", "deep JSON"]


def check_untouched(victim: Path) -> None:
    assert victim.read_bytes() == PRECIOUS
    assert not victim.with_name("made").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_planted_lock_files(folder: Path, out: Path, victim: Path, kind: str) -> None:
    """Once, the link was followed and its target truncated; by verify --repair, too."""
    plant(out / LOCK, kind, victim)
    with pytest.raises(ShardsError, match=rf"{LOCK}: expected a lock file, got ") as caught:
        build(folder, out)
    assert "\n" not in str(caught.value)
    check_untouched(victim)
    with pytest.raises(ShardsError), Workspace(out).locked(print):
        pass
    assert os.path.lexists(out / LOCK)  # not ours to remove


def test_planted_lock_files_stop_a_repair(dataset: Path, folder: Path, tmp_path: Path, victim: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    shard = min(data.glob("shard-*"))
    os.truncate(shard, 5000)
    plant(data / LOCK, "link", victim)
    result = CliRunner().invoke(main, ["verify", str(data), "--repair", "--source", str(folder)])
    assert result.exit_code == 1
    assert f"{data / LOCK}: expected a lock file, got a link" in result.stderr
    check_untouched(victim)
    assert shard.stat().st_size == 5000


def test_a_replaced_lock_file_is_left_alone(out: Path, victim: Path) -> None:
    with Workspace(out).locked(print):
        (out / LOCK).unlink()
        (out / LOCK).symlink_to(victim)
    assert (out / LOCK).is_symlink()
    check_untouched(victim)


def test_the_text_of_a_lock_file_is_escaped(out: Path) -> None:
    """Its holder wrote it: it may contain escape sequences, or deeply nested JSON."""
    text = json.dumps({"pid": 1, "host": "\x1b]0;owned\x07\n", "since": "\u202e" + "x" * 900})
    code = (
        "import fcntl, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\nfcntl.lockf(fd, fcntl.LOCK_EX, 1, 0)\n"
        "os.write(fd, sys.argv[2].encode())\nprint('held', flush=True)\nsys.stdin.read()\n"
    )
    for content in (text, "[" * 4000, '{"pid": ' + "9" * 3000 + "}"):
        command = [sys.executable, "-c", code, str(out / LOCK), content]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            expected = "expected no other build at work there, got "
            with pytest.raises(ShardsError, match=expected) as caught, Workspace(out).locked(print):
                pass
            holder.communicate(timeout=60)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 700
        (out / LOCK).unlink()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [BUILD, "shard-00001" + RECORD, "shard-00001"])
def test_planted_manifests_records_and_shards(
    one_each: Build, folder: Path, tmp_path: Path, victim: Path, kind: str, name: str
) -> None:
    """The build succeeds, or names what is in its way, and succeeds once that is removed."""
    out = stopped(one_each, folder, tmp_path / "out")
    (shard,) = (path for path in out.glob("shard-00001.*") if path.suffix != RECORD)
    path = {BUILD: out / BUILD, "shard-00001": shard}.get(name, shard.with_name(shard.name + RECORD))
    plant(path, kind, victim)
    try:
        one_each(folder, out)
    except ShardsError as error:
        text = str(error)
        assert str(path.name) in text
        if path.is_dir():
            path.rmdir()
            assert "could not be written: Is a directory" in text or name == BUILD
        one_each(folder, out, overwrite=name == BUILD)
    assert digests(out) == digests(one_each(folder, tmp_path / "undisturbed"))
    check_untouched(victim)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "folder"])
@pytest.mark.parametrize("name", [BUILD, "index.json", "shard-00000.h5.json", "shard-00000.h5"])
def test_planted_staged_files(folder: Path, out: Path, tmp_path: Path, victim: Path, kind: str, name: str) -> None:
    plant(out / (name + PART), kind, victim)
    build(folder, out)
    check_untouched(victim)
    assert digests(out) == digests(build(folder, tmp_path / "undisturbed"))


def test_a_folder_in_place_of_a_staged_file_is_reported(folder: Path, out: Path) -> None:
    (out / "shard-00001.h5.part").mkdir()
    with pytest.raises(ShardsError, match="shard-00001.h5.part: could not be written: Is a directory"):
        build(folder, out)
    (out / "shard-00001.h5.part").rmdir()
    build(folder, out)


def test_an_earlier_dataset_survives_a_failed_commit(folder: Path, tmp_path: Path) -> None:
    """A folder with a shard's name is found before the old index is removed."""
    out = build(folder, tmp_path / "out")
    before = digests(out)
    (out / "shard-00077.h5").mkdir()
    with pytest.raises(ShardsError, match=r"shard-00077.h5: expected a file or nothing, got a folder"):
        build(folder, out, border="replicate", overwrite=True)
    (out / "shard-00077.h5").rmdir()
    assert before.items() <= digests(out).items()
    build(folder, out, border="replicate", overwrite=True)


@pytest.mark.parametrize("container", ["hdf5", "raw"])
@pytest.mark.parametrize("kind", KINDS)
def test_writers_create_new_files_only(out: Path, victim: Path, container: str, kind: str) -> None:
    path = out / "shard.part"
    plant(path, kind, victim)
    with pytest.raises(FileExistsError):
        open_writer(container, path, (2,), 3072)
    check_untouched(victim)


def test_a_file_replaced_while_a_shard_is_written(out: Path, victim: Path) -> None:
    """A failed HDF5 file is truncated, and not the file that took its name."""
    path = out / "shard.part"

    def interrupted() -> None:
        with open_writer("hdf5", path, (2,), 3072):
            path.unlink()
            path.symlink_to(victim)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    check_untouched(victim)


Facts = dict[str, Any]


def outside(facts: Facts) -> None:
    facts["shard"]["file"] = "../outside"


def another_image(facts: Facts) -> None:
    facts["images"][0]["name"] = "another"


def another_source(facts: Facts) -> None:
    facts["images"][0]["runs"]["HR"]["source"] = "another.png"


def another_size(facts: Facts) -> None:
    facts["images"][0]["height"] -= 1


def one_plane_less(facts: Facts) -> None:
    del facts["images"][0]["runs"]["X2"]


def one_plane_more(facts: Facts) -> None:
    facts["images"][0]["runs"]["X8"] = facts["images"][0]["runs"]["X4"]


def overlapping(facts: Facts) -> None:
    facts["images"][0]["runs"]["X2"] |= {key: facts["images"][0]["runs"]["HR"][key] for key in ("offset", "crc32")}


def beyond(facts: Facts) -> None:
    facts["images"][0]["runs"]["X2"]["offset"] = 1 << 61


def endless(facts: Facts) -> None:
    facts["shard"]["bytes"] = 1 << 62


def a_sum_that_wraps(facts: Facts) -> None:
    facts["images"][0]["runs"]["X2"]["offset"] = (1 << 63) - 4096


def floats(facts: Facts) -> None:
    facts["shard"]["bytes"] = float(facts["shard"]["bytes"])


def truths(facts: Facts) -> None:
    facts["images"][0]["runs"]["HR"]["crc32"] = True


def by_position(facts: Facts) -> None:
    facts["images"][0] = list(facts["images"][0].values())


def skipped_image(facts: Facts) -> None:
    facts["skipped"] = [{"image": facts["images"].pop()["name"], "source": "b.png", "reason": "no reason"}]
    del facts["shard"]


def twice(facts: Facts) -> None:
    facts["images"] *= 2


def made_elsewhere(facts: Facts) -> None:
    facts["images"][0]["runs"]["X2"] |= {"source": "bx2.png", "source_sha256": "0" * 64}


def no_stamps(facts: Facts) -> None:
    facts["stamps"] = []


LIES = [outside, another_image, another_source, another_size, one_plane_less, one_plane_more, overlapping, beyond,
        endless, a_sum_that_wraps, floats, truths, by_position, skipped_image, twice, made_elsewhere,
        no_stamps]  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_records_that_contradict_the_plan(
    one_each: Build, folder: Path, tmp_path: Path, lie: Callable[[Facts], None]
) -> None:
    """A record of this build with a valid digest, but false content: the shard is rebuilt."""
    (tmp_path / "outside").write_bytes(PRECIOUS)
    out = stopped(one_each, folder, tmp_path / "out")
    path = next(out.glob("shard-00001.*.json"))
    facts = json.loads(path.read_bytes().splitlines()[0])
    lie(facts)
    path.write_bytes(seal(facts))
    notes: list[str] = []
    one_each(folder, out, note=notes.append, skip_bad=lie is skipped_image)
    if lie is not skipped_image:  # whoever can write here can also call an image bad
        assert notes == [f"{out}: 2 of 5 shards are already finished; all checksums match"]
        assert digests(out) == digests(one_each(folder, tmp_path / "undisturbed"))
    assert (tmp_path / "outside").read_bytes() == PRECIOUS


def forged(out: Path, change: Callable[[bytearray, Facts], None]) -> None:
    """Change a finished shard and update its record: length, digest, and checksums of tile runs."""
    import zlib

    record = next(out.glob("shard-00001.*.json"))
    shard = record.with_suffix("")
    facts = json.loads(record.read_bytes().splitlines()[0])
    data = bytearray(shard.read_bytes())
    change(data, facts)
    shard.write_bytes(data)
    (image,) = facts["images"]
    for plane, run in image["runs"].items():
        scale, side = (1, 64) if plane == "HR" else (int(plane[1]), 32)
        rows, cols = (-(-(image[key] // scale) // side) for key in ("height", "width"))
        run["crc32"] = zlib.crc32(data[run["offset"] : run["offset"] + rows * cols * side * side * 3])
    facts["shard"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    record.write_bytes(seal(facts))


def padding(data: bytearray, facts: Facts) -> None:
    data[facts["images"][0]["runs"]["HR"]["offset"] + (64 * 64 + 40) * 3] = 1  # image b is 97 pixels wide


def not_hdf5(data: bytearray, facts: Facts) -> None:
    data[0] ^= 1  # in a raw shard, a pixel: only --source can detect that


def room_for_more(data: bytearray, facts: Facts) -> None:
    data.extend(bytes(3 << 20))


@pytest.mark.parametrize("change", [padding, not_hdf5, room_for_more])
def test_forged_shards_with_matching_records(
    one_each: Build, folder: Path, tmp_path: Path, change: Callable[[bytearray, Facts], None]
) -> None:
    out = stopped(one_each, folder, tmp_path / "out")
    raw = bool(list(out.glob("*.raw")))
    forged(out, change)
    notes: list[str] = []
    one_each(folder, out, note=notes.append)
    if not (change is not_hdf5 and raw):
        assert notes == [f"{out}: 2 of 5 shards are already finished; all checksums match"]
        assert digests(out) == digests(one_each(folder, tmp_path / "undisturbed"))


def test_records_and_shards_of_another_user_are_ignored(
    one_each: Build, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = stopped(one_each, folder, tmp_path / "out")
    expected = digests(one_each(folder, tmp_path / "undisturbed"))
    monkeypatch.setattr(loader.system.safefile, "is_own", lambda found, folder: not stat.S_ISREG(found.st_mode))
    monkeypatch.setattr("prep.shard.shard.open_own", loader.system.safefile.open_named)  # for the build's own new files
    notes: list[str] = []
    one_each(folder, out, note=notes.append)
    assert notes == []
    assert digests(out) == expected


def test_which_files_are_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a server maps users to others, the owner of a new file shows who we are there."""
    path = tmp_path / "file"
    path.touch()
    os.close(open_own(path))
    found = path.stat()
    monkeypatch.setattr(os, "geteuid", lambda: found.st_uid + 1)
    loader.system.safefile._owner_of_new_files.cache_clear()
    os.close(open_own(path))
    monkeypatch.setattr(loader.system.safefile, "_owner_of_new_files", lambda folder: found.st_uid + 1)
    with pytest.raises(UnsafeFileError, match=f"a file of user {found.st_uid}"):
        open_own(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("mode", "who"), [(0o777, "everyone"), (0o1777, None), (0o755, None), (0o700, None)])
def test_a_folder_writable_by_others_is_reported(folder: Path, out: Path, mode: int, who: str | None) -> None:
    out.chmod(mode)
    notes: list[str] = []
    build(folder, out, note=notes.append)
    assert notes == ([f"{out}: can also be written by {who}: files in it may be theirs (see SECURITY.md)"]
                     if who else [])  # fmt: skip


def test_a_folder_writable_by_a_group_or_owned_by_another_user(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.chmod(0o775)
    monkeypatch.setattr(prep.workspace.trust, "_is_own_group", lambda number: False)
    assert other_writers(out) == f"its group, {out.stat().st_gid}"
    monkeypatch.setattr(prep.workspace.trust, "_is_own_group", lambda number: True)
    assert other_writers(out) is None
    monkeypatch.setattr(prep.workspace.trust, "is_own", lambda found, folder: False)
    monkeypatch.setattr(Path, "stat", lambda self: os.stat_result((0o40755, 0, 0, 0, 77, 0, 0, 0, 0, 0)))
    assert other_writers(out) == "its owner, user 77"


@pytest.mark.parametrize("kind", KINDS)
def test_planted_lists_of_skipped_images(folder: Path, tmp_path: Path, victim: Path, kind: str) -> None:
    """Checking a complete dataset reads the list, and never blocks."""
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    (images / "bad.png").write_bytes(b"no image")
    out = build(images, tmp_path / "out", skip_bad=True)
    build(images, out, skip_bad=True)
    plant(out / SKIPPED, kind, victim)
    with pytest.raises(ShardsError, match=r"HR sources: 1 added \(bad.png\)|skipped.json: "):
        build(images, out, skip_bad=True)
    check_untouched(victim)


def test_an_index_that_readers_would_refuse_is_not_committed(folder: Path, tmp_path: Path) -> None:
    out = build(folder, tmp_path / "out")
    index = read_index(out)
    before = digests(out)
    plane = index.planes[1]
    broken = replace(index, planes=index.planes | {1: replace(plane, offset=plane.offset + 1)}, sha256="")
    with pytest.raises(FormatError, match="a multiple of 4096"):
        Workspace(out).commit(broken, [])
    with pytest.raises(ShardsError, match="expected an index of at most"):
        Workspace(out).commit(replace(index, made_by="x" * (17 << 20), sha256=""), [])
    assert digests(out) == before


def test_a_foreign_manifest_is_shown_in_short_printable_lines(one_each: Build, folder: Path, tmp_path: Path) -> None:
    out = stopped(one_each, folder, tmp_path / "out")
    facts = json.loads((out / BUILD).read_bytes().splitlines()[0])
    facts |= {"made_by": "\x1b[2J" * 900, "sources": {"HR": ["\x1b]0;x\x07" + "y" * 900, "\u202e"]}}
    (out / BUILD).write_bytes(seal(facts))
    with pytest.raises(ShardsError) as caught:
        one_each(folder, out)
    lines = str(caught.value).splitlines()
    assert all(line.isprintable() and len(line) < 2000 for line in lines)
    assert len(lines) == 4


def test_a_dataset_folder_may_be_a_link(folder: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "name").symlink_to(out)
    build(folder, tmp_path / "name")
    assert read_index(tmp_path / "name").sha256 == read_index(out).sha256


def test_a_folder_without_write_permission(folder: Path, out: Path) -> None:
    """Permissions do not restrain root."""
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    out.chmod(0o500)
    with pytest.raises(ShardsError, match="could not be written: Permission denied"):
        build(folder, out)
    out.chmod(0o700)
    assert not list(out.iterdir())


def test_a_hard_link_to_a_shard_keeps_its_content(folder: Path, tmp_path: Path, victim: Path) -> None:
    """A build never writes in place."""
    out = build(folder, tmp_path / "out")
    shard = min(out.glob("shard-*"))
    before = shard.read_bytes()
    (tmp_path / "second").hardlink_to(shard)
    build(folder, out, border="replicate", overwrite=True)
    assert (tmp_path / "second").read_bytes() == before
    assert shard.read_bytes() != before


def test_images_are_never_written(folder: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "images/a.png", photograph(64, 64))
    before = digests(tmp_path / "images")
    with pytest.raises(ShardsError):
        build(tmp_path / "images", tmp_path / "images" / "a.png")
    assert digests(tmp_path / "images") == before
