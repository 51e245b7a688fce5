"""Difficult sources: other locales, links, failing storage, files that change while being read."""

import errno
import io
import itertools
import os
import shutil
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from helpers import Build, digests, photograph, write_image
from helpers import build as typed_build
from PIL import Image

from loader.errors import ShardsError
from loader.format.index import read_index
from loader.system.safefile import open_named
from prep.images import decode as images
from prep.images.decode import read_file, read_image, read_size
from prep.images.faults import ImageError, SourceFolder, StorageError, explain
from prep.images.find import find_images
from prep.images.pair import pair_lr

build: Build = typed_build
RGB = photograph(23, 31)
STORAGE = ("ENOTCONN", "EIO", "ESTALE", "ETIMEDOUT", "EMFILE", "ENOMEM", "EHOSTDOWN", "ENODEV", "EREMOTEIO", "EUCLEAN")


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, kind)
    return file.getvalue()


def prep(folder: Path, *arguments: str, flags: tuple[str, ...] = (), **environment: str) -> Any:
    """Run the command in its own process, for example under another locale."""
    return subprocess.run(
        [sys.executable, *flags, "-m", "prep.cli", *arguments],
        capture_output=True, cwd=folder, check=False, timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
    )  # fmt: skip


# Names


def locales(folder: Path) -> dict[str, dict[str, str]]:
    """Return environments with file names in ASCII, UTF-8 and, if its definition is installed, Latin-1."""
    plain = {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
    found = {
        "C": plain | {"LC_ALL": "C"},
        "POSIX": plain | {"LC_ALL": "POSIX"},
        "C.UTF-8": plain | {"LC_ALL": "C.UTF-8"},
    }
    if shutil.which("localedef"):
        command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "en_US.ISO-8859-1")]
        made = subprocess.run(command, capture_output=True, check=False, timeout=120)
        if made.returncode in (0, 1) and (folder / "en_US.ISO-8859-1").is_dir():
            found["latin-1"] = plain | {"LC_ALL": "en_US.ISO-8859-1", "LOCPATH": str(folder)}
    return found


def test_names_are_independent_of_the_locale(tmp_path: Path) -> None:
    """Whatever LC_ALL says, the datasets are identical and printing does not fail."""
    (tmp_path / "locales").mkdir()
    write_image(tmp_path / "in/Bär.bmp", RGB)
    write_image(tmp_path / "in/日本/zoë.png", RGB)
    (tmp_path / "in/schlecht ü.png").write_text("no image")
    found = {}
    for name, environment in locales(tmp_path / "locales").items():
        arguments = ("build-shards", "in", "--scale", "2", "--out", name, "--workers", "1", "--on-error", "skip")
        run = prep(tmp_path, *arguments, flags=("-X", "utf8=0"), **environment)
        assert run.returncode == 3, (name, run.stderr)
        assert b"Traceback" not in run.stderr
        found[name] = digests(tmp_path / name)
    shown = prep(tmp_path, "info", "C", flags=("-X", "utf8=0"), **locales(tmp_path / "locales")["C"])
    assert shown.returncode == 0, shown.stderr
    assert set(read_index(tmp_path / "C").name) == {"Bär", "zoë"}
    assert all(other == found["C.UTF-8"] for other in found.values())


def test_all_names_that_are_not_utf8_are_listed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in (b"a\xff.png", b"b\xe4.png", b"good.png"):
        try:
            Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name)).write_bytes(encoded("PNG"))
        except OSError:
            pytest.skip("this file system allows UTF-8 names only")
    with pytest.raises(ShardsError) as caught:
        find_images([tmp_path / "in"])
    assert [line.rsplit("/")[-1] for line in str(caught.value).splitlines()[1:]] == [r"a\xff.png", r"b\xe4.png"]


def test_names_that_differ_only_in_normal_form(tmp_path: Path) -> None:
    """macOS stores names in another normal form than users type: they look the same, and pair."""
    composed, apart = (unicodedata.normalize(form, "Bär") for form in ("NFC", "NFD"))
    write_image(tmp_path / "hr" / f"{composed}.png", RGB)
    write_image(tmp_path / "lr" / f"{apart}x2.png", RGB[::2, ::2])
    hr = find_images([tmp_path / "hr"])
    assert [file.stem for file in pair_lr(hr, tmp_path / "lr", 2)] == [f"{apart}x2"]
    write_image(tmp_path / "hr/more" / f"{apart}.png", RGB)
    with pytest.raises(ShardsError, match=r"expected each stem once.*\n  Bär: .*Ba\\u0308r"):
        find_images([tmp_path / "hr"])


def test_names_that_differ_in_case_are_distinct(tmp_path: Path) -> None:
    write_image(tmp_path / "in/a.png", RGB)
    write_image(tmp_path / "in/A.png", RGB)
    if len(list((tmp_path / "in").iterdir())) < 2:
        pytest.skip("this file system ignores case")
    assert [file.stem for file in find_images([tmp_path / "in"])] == ["A", "a"]


# Links


def test_listing_order_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links alias folders here and elsewhere. Six listing orders give one result, real folders first."""
    for name in ("b/one.png", "b/inner/two.png", "../elsewhere/deep/three.png"):
        write_image(tmp_path / "in" / name, RGB)
    (tmp_path / "in/a").symlink_to("b")
    (tmp_path / "in/c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/d").symlink_to(tmp_path / "elsewhere/deep")
    (tmp_path / "in/b/loop").symlink_to(tmp_path / "in")
    scandir, outcomes = os.scandir, []
    for order in itertools.permutations(range(3)):

        class Shuffled:
            def __init__(self, folder: Any, order: tuple[int, ...] = order) -> None:
                with scandir(folder) as found:
                    self.entries = sorted(found, key=lambda entry: (order["abc".find(entry.name) % 3], entry.name))

            def __enter__(self) -> Any:
                return iter(self.entries)

            def __exit__(self, *_: object) -> None: ...

        monkeypatch.setattr(os, "scandir", Shuffled)
        notes: list[str] = []
        outcomes.append([file.name for file in find_images([tmp_path / "in"], notes.append)])
        assert notes == [f"{tmp_path / 'in'}: 1 of 3 images were reached through links"]
    assert outcomes == [["b/one.png", "c/deep/three.png", "b/inner/two.png"]] * 6


def test_links_are_reported(tmp_path: Path) -> None:
    write_image(tmp_path / "in/a.png", RGB)
    (tmp_path / "in/b.png").symlink_to("a.png")
    (tmp_path / "in/gone").symlink_to(tmp_path / "not mounted")
    run = prep(tmp_path, "build-shards", "in", "--scale", "2", "--workers", "1")
    assert run.returncode == 0
    assert run.stderr.decode().splitlines() == [
        "in: 1 broken links are ignored: in/gone",
        "in: 1 of 2 images were reached through links",
    ]


# Storage


@pytest.mark.parametrize("name", STORAGE)
def test_storage_errors_are_not_bad_images(tmp_path: Path, name: str) -> None:
    number = getattr(errno, name)
    assert isinstance(explain(OSError(number, os.strerror(number)), tmp_path / "a.png"), StorageError)


@pytest.mark.parametrize("name", ["ENOENT", "EACCES", "ELOOP", "EISDIR", "ENAMETOOLONG", "EPERM"])
def test_file_errors_are_bad_images(tmp_path: Path, name: str) -> None:
    error = OSError(getattr(errno, name), "so")
    (tmp_path / "in").mkdir()
    source_folder = SourceFolder.of(tmp_path / "in")
    assert isinstance(explain(error, tmp_path / "in/a.png", source_folder), ImageError)
    (tmp_path / "in").rename(tmp_path / "moved")  # as after an unmount
    assert isinstance(explain(error, tmp_path / "in/a.png", source_folder), StorageError)
    (tmp_path / "in").mkdir()
    assert isinstance(explain(error, tmp_path / "in/a.png", source_folder), StorageError)


class DeadMount:
    """Makes open() and stat() of one image fail, as on a dead mount."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
        self.name, self.number, self.dead = name, number, True
        self._open, self._stat = open_named, Path.stat
        monkeypatch.setattr(images, "open_named", self.open)
        monkeypatch.setattr(Path, "stat", lambda path, **options: self.stat(path, **options))

    def _check(self, path: Path) -> None:
        if self.dead and path.name == self.name:
            raise OSError(self.number, os.strerror(self.number), str(path))

    def open(self, path: Path) -> int:
        self._check(path)
        return self._open(path)

    def stat(self, path: Path, **options: Any) -> os.stat_result:
        self._check(path)
        return self._stat(path, **options)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_build_stops_when_a_mount_dies_and_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip_bad: bool
) -> None:
    out, each = tmp_path / "out", {"images_per_shard": 1, "skip_bad": skip_bad}
    expected = digests(build(folder, tmp_path / "undisturbed", **each))
    storage = DeadMount(monkeypatch, "d e.png", errno.ENOTCONN)

    def die(done: int) -> None:
        storage.dead = done >= 2

    storage.dead = True
    with pytest.raises(StorageError, match=r"expected working storage, got Transport endpoint is not connected"):
        build(folder, tmp_path / "headers", **each)
    assert not (tmp_path / "headers").exists()
    storage.dead = False
    with pytest.raises(ShardsError, match=r"(?s)d e.png: expected working storage.*\n3 of 5 shards are finished"):
        build(folder, out, **each, report=die)
    kept = digests(out)
    assert "index.json" not in kept
    storage.dead = True
    with pytest.raises(ShardsError, match=r"d e.png: expected working storage"):
        build(folder, out, **each)  # file times cannot be compared, which is no reason to rebuild everything
    assert digests(out) == kept
    storage.dead = False
    build(folder, out, **each)
    assert digests(out) == expected


@pytest.mark.parametrize("empty", [False, True])
def test_images_of_a_vanished_source_are_not_skipped(folder: Path, tmp_path: Path, empty: bool) -> None:
    """After an unmount the folder is gone or empty. None of its images is bad."""
    source, out, each = tmp_path / "in", tmp_path / "out", {"images_per_shard": 1, "skip_bad": True}
    shutil.copytree(folder, source)

    def unmount(done: int) -> None:
        if done == 2:
            source.rename(tmp_path / "away")
            if empty:
                source.mkdir()

    with pytest.raises(ShardsError, match=r"(?s)/in is gone or has been replaced.*\n2 of 5 shards are finished"):
        build(source, out, **each, report=unmount)
    assert not (out / "index.json").exists()
    if empty:
        source.rmdir()
    (tmp_path / "away").rename(source)
    build(source, out, **each)
    assert digests(out) == digests(build(folder, tmp_path / "undisturbed", **each))


def test_failing_storage_in_a_worker(folder: Path, tmp_path: Path) -> None:
    """An error in a worker process is one clear line, and stops all workers."""
    code = (
        "import errno, os, sys\n"
        "from prep.shard import planes\n"
        "true = planes.read_file\n"
        "def dying(path, *rest):\n"
        "    if path.name == 'd e.png':\n"
        "        from prep.images.faults import explain\n"
        "        raise explain(OSError(errno.EIO, os.strerror(errno.EIO)), path)\n"
        "    return true(path, *rest)\n"
        "planes.read_file = dying\n"
        "if __name__ == '__main__':\n"
        "    from prep.cli import main; main()\n"
    )
    (tmp_path / "dying.py").write_text(code)
    words = ["build-shards", str(folder), "--scale", "2", "--out", "out", "--workers", "2", "--images-per-shard", "1"]
    run = subprocess.run(
        [sys.executable, "dying.py", *words, "--on-error", "skip"],
        capture_output=True, text=True, cwd=tmp_path, check=False, timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "d e.png: expected working storage, got Input/output error" in run.stderr
    assert not (tmp_path / "out/index.json").exists()


def test_storage_error_within_a_header_is_not_damage(tmp_path: Path) -> None:
    """Pillow treats errors of every type as a damaged file."""

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if size is None or self.tell() + size > 40:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    from prep.images.header import read_header

    for kind in ("PNG", "JPEG", "TIFF", "WEBP"):
        data = encoded(kind)
        with pytest.raises(OSError, match="Input/output error"):
            read_header(Failing(data), len(data), "x", 1 << 20)


def test_entry_of_unknown_type_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "in/a.png", RGB)
    (tmp_path / "in/sub").symlink_to("dead mount")
    real_stat = Path.stat

    def stat(path: Path, **options: Any) -> os.stat_result:
        if path.name == "sub":
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        return real_stat(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(ShardsError, match="sub: expected a readable folder, got Transport endpoint"):
        find_images([tmp_path / "in"])
    with pytest.raises(ShardsError, match="sub: expected a folder of images .*, got Transport endpoint"):
        find_images([tmp_path / "in/sub"])


def test_out_of_memory_is_not_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV does not say why it returns no pixels."""
    monkeypatch.setattr("cv2.imdecode", lambda *_: None)
    with pytest.raises(ImageError, match="truncated or damaged"):
        images.decode(encoded("PNG"), "x")

    def short(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("numpy.empty", short)
    with pytest.raises(MemoryError):
        images.decode(encoded("PNG"), "x")


# Files that change, and special files


def test_pipe_instead_of_an_image_does_not_block(tmp_path: Path) -> None:
    write_image(tmp_path / "in/a.png", RGB)
    (found,) = find_images([tmp_path / "in"])
    found.path.unlink()
    os.mkfifo(found.path)
    started = time.monotonic()
    for read in (read_size, read_image):
        with pytest.raises(ImageError, match="a.png: expected a readable file, got a pipe, not a regular file"):
            read(found.path)
    assert time.monotonic() - started < 60
    with pytest.raises(ShardsError, match="expected a folder of images or an image file, got a pipe"):
        find_images([found.path])


def test_growing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    real_fstat = os.fstat

    def short(number: int) -> os.stat_result:
        found = list(real_fstat(number))
        found[6] -= 1
        return os.stat_result(found)

    monkeypatch.setattr("os.fstat", short)
    with pytest.raises(ImageError, match="got one that is growing"):
        read_file(tmp_path / "a.png")
