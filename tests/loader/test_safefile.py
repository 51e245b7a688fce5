"""safefile: planted links, pipes and files in a shared folder are not followed, waited for or overwritten."""

import errno
import os
import pickle
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loader.errors import ShardsError
from loader.system import safefile
from loader.system.safefile import (
    UnsafeFileError,
    describe_kind,
    open_exclusive,
    open_member,
    open_named,
    read_member,
    read_named,
    sync_folder,
    write_atomically,
    write_staged,
)

OPENERS = [open_member, open_named]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A shared folder with a file, next to a file outside that nobody may reach through it."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/file").write_bytes(b"content")
    (tmp_path / "secret").write_bytes(b"secret")
    return tmp_path / "shared"


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    def number() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = number()
    yield
    assert number() == before


def content(opened: int) -> bytes:
    with os.fdopen(opened, "rb") as file:
        return file.read()


@pytest.mark.parametrize("opener", OPENERS)
def test_regular_files(place: Path, opener: Callable[[Path], int]) -> None:
    descriptor = opener(place / "file")
    assert not os.get_inheritable(descriptor)
    assert content(descriptor) == b"content"
    with pytest.raises(FileNotFoundError):
        opener(place / "none")
    with pytest.raises(NotADirectoryError):
        opener(place / "file/more")


def test_links_within_the_folder(place: Path) -> None:
    (place / "one").symlink_to("file")
    (place / "two").symlink_to("one")
    (place / "absolute").symlink_to(place / "file")
    (place.parent / "folder").symlink_to(place)
    for folder in (place, place.parent / "folder", place.parent / "folder/../shared"):
        for name in ("one", "two", "absolute"):
            assert content(open_member(folder / name)) == b"content"
            assert content(open_named(folder / name)) == b"content"


def test_links_out_of_the_folder(place: Path) -> None:
    """Members are refused, and the message shows the link; named paths may lead anywhere."""
    (place / "inner").mkdir()
    (place / "inner/file").write_bytes(b"inner")
    (place / "hop").symlink_to("../secret")
    for name, target in (("up", "../secret"), ("absolute", place.parent / "secret"), ("down", "inner/file"),
                         ("twice", "hop")):  # fmt: skip
        (place / name).symlink_to(target)
        with pytest.raises(UnsafeFileError) as caught:
            open_member(place / name)
        assert caught.value.strerror == f"a link to {target}"
        assert caught.value.filename == str(place / name)
        assert content(open_named(place / name)) in (b"secret", b"inner")


@pytest.mark.parametrize("opener", OPENERS)
def test_dangling_links(place: Path, opener: Callable[[Path], int]) -> None:
    (place / "loop").symlink_to("loop")
    (place / "to").symlink_to("fro")
    (place / "fro").symlink_to("to")
    for name in ("loop", "to", "fro"):
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            opener(place / name)
    (place / "gone").symlink_to("nothing")
    with pytest.raises(FileNotFoundError):
        opener(place / "gone")


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("opener", OPENERS)
def test_other_kinds_of_files(place: Path, opener: Callable[[Path], int], linked: bool) -> None:
    """Pipes do not block, and devices are not read."""
    os.mkfifo(place / "pipe")
    (place / "folder").mkdir()
    for name, words in (("pipe", "a pipe"), ("folder", "a folder")):
        path = place / name
        if linked:
            path = place / f"to {name}"
            path.symlink_to(name)
        with pytest.raises(UnsafeFileError) as caught:
            opener(path)
        assert caught.value.strerror == f"{words}, not a regular file"
        assert caught.value.filename == str(path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(place / "socket"))
        with pytest.raises(OSError, match="No such device or address"):
            opener(place / "socket")
    with pytest.raises(UnsafeFileError, match="a device, not a regular file"):
        opener(Path("/dev/zero"))
    (place / "zero").symlink_to("/dev/zero")
    with pytest.raises(UnsafeFileError, match="a device, not a regular file|a link to /dev/zero"):
        opener(place / "zero")


def test_kinds() -> None:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device"}
    assert {kind: describe_kind(kind | 0o644) for kind in kinds} == kinds


def test_link_target_replaced_by_link(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is replaced between resolving the link and opening it."""
    (place / "link").symlink_to("file")
    real = os.path.realpath

    def exchanged(path: Path) -> str:
        found = real(path)
        if found.endswith("/file"):
            (place / "file").unlink()
            (place / "file").symlink_to("../secret")
        return found

    monkeypatch.setattr(os.path, "realpath", exchanged)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        open_member(place / "link")


def test_files_swapped_concurrently(place: Path) -> None:
    """While someone swaps the file for a link to a secret, and a pipe, the secret is never read, and nothing blocks."""
    os.mkfifo(place / "pipe")
    (place / "out").symlink_to("../secret")
    (place / "good").write_bytes(b"content")
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            for name in ("good", "out", "pipe"):
                (place / "staged").unlink(missing_ok=True)
                os.link(place / name, place / "staged", follow_symlinks=False)
                (place / "staged").replace(place / "file")

    thread = threading.Thread(target=swap)
    thread.start()
    seen, errors = set(), set()
    try:
        for _ in range(1500):
            try:
                seen.add(read_member(place / "file", 100))
            except OSError as error:
                errors.add(error.errno)
    finally:
        done.set()
        thread.join()
    assert seen <= {b"content"}
    assert errors <= {errno.ELOOP, errno.EINVAL, errno.ENOENT}


@pytest.mark.parametrize("reader", [read_member, read_named])
def test_size_limits(place: Path, reader: Callable[[Path, int], bytes]) -> None:
    assert reader(place / "file", 7) == b"content"
    with pytest.raises(OSError, match="more than 6 bytes") as caught:
        reader(place / "file", 6)
    assert caught.value.errno == errno.EFBIG
    (place / "empty").touch()
    assert reader(place / "empty", 0) == b""
    (place / "sparse").touch()
    os.truncate(place / "sparse", 1 << 40)  # only read up to the limit
    with pytest.raises(UnsafeFileError, match="more than 1000 bytes"):
        reader(place / "sparse", 1000)


@pytest.mark.parametrize("planted", ["file", "link", "link to nothing", "pipe", "folder"])
def test_exclusive(place: Path, planted: str) -> None:
    path = place / "new"
    plant(path, planted)
    with pytest.raises(FileExistsError):
        open_exclusive(path)
    assert (place.parent / "secret").read_bytes() == b"secret"
    assert not (place.parent / "made").exists()


def plant(path: Path, planted: str) -> None:
    match planted:
        case "file":
            path.write_bytes(b"planted")
        case "link":
            path.symlink_to("../secret")
        case "link to nothing":
            path.symlink_to("../made")
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()


def test_exclusive_files_can_be_read_and_written(place: Path) -> None:
    descriptor = open_exclusive(place / "new", 0o600)
    os.write(descriptor, b"abc")
    assert os.pread(descriptor, 9, 0) == b"abc"
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)
    assert stat.S_IMODE((place / "new").stat().st_mode) == 0o600


@pytest.mark.parametrize("write", [write_staged, write_atomically])
@pytest.mark.parametrize("planted", ["nothing", "file", "link", "link to nothing", "pipe"])
def test_existing_files_are_not_written_through(
    place: Path, write: Callable[[Path, bytes], None], planted: str
) -> None:
    plant(place / "out", planted)
    hard = place / "hard"
    if planted == "file":
        os.link(place / "out", hard)
    write(place / "out", b"new")
    assert (place / "out").read_bytes() == b"new"
    assert not (place / "out").is_symlink()
    assert (place / "out").stat().st_nlink == 1
    assert (place.parent / "secret").read_bytes() == b"secret"
    assert not (place.parent / "made").exists()
    if planted == "file":
        assert hard.read_bytes() == b"planted"
    assert {path.name for path in place.iterdir()} - {"hard"} == {"file", "out"}


@pytest.mark.parametrize("planted", ["file", "link", "link to nothing", "pipe", "folder"])
def test_file_planted_between_removal_and_creation(place: Path, planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guessing the temporary name gains nothing: the file is created exclusively, or it is an error."""
    real = safefile.open_exclusive

    def late(path: Path, mode: int = 0o666) -> int:
        plant(path, planted)
        return real(path, mode)

    monkeypatch.setattr(safefile, "open_exclusive", late)
    for write in (write_staged, write_atomically):
        with pytest.raises(OSError, match="File exists|Is a directory"):
            write(place / "file" if write is write_atomically else place / "new", b"new")
    assert (place / "file").read_bytes() == b"content"
    assert (place.parent / "secret").read_bytes() == b"secret"
    assert not (place.parent / "made").exists()


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_leaves_nothing(
    place: Path, call: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fails)
    elif call == "replace":
        monkeypatch.setattr(Path, "replace", fails)
    else:
        real = os.fdopen

        def full(descriptor: int, mode: str) -> object:
            file = real(descriptor, mode)
            file.close()
            return OpenFile(fails)

        monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(type(error)) as caught:
        write_atomically(place / "file", b"new" * 100_000)
    if isinstance(caught.value, OSError):
        assert caught.value.filename == str(place / "file")
    monkeypatch.undo()
    assert [path.name for path in place.iterdir()] == ["file"]
    assert (place / "file").read_bytes() == b"content"


class OpenFile:
    """A file whose writes fail."""

    def __init__(self, write: Callable[..., None]) -> None:
        self.write = write

    def __enter__(self) -> "OpenFile":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a read-only file system; simulated, since root may write to any folder."""

    def read_only(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, mode)

    real = os.open
    (tmp_path / "file").write_bytes(b"content")
    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError, match="Read-only file system") as caught:
        write_atomically(tmp_path / "file", b"new")
    assert caught.value.filename == str(tmp_path / "file")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "none/file", b"new")


def test_long_names(place: Path) -> None:
    """Temporary names are short, so files with names of the maximum length can be written."""
    path = place / ("x" * 255)
    write_atomically(path, b"new")
    assert read_member(path, 3) == b"new"


def test_folders_without_fsync(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, passes in ((errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)):

        def refuses(descriptor: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", refuses)
        if passes:
            sync_folder(place)
        else:
            with pytest.raises(OSError, match="Input/output error"):
                sync_folder(place)
    monkeypatch.undo()
    with pytest.raises(NotADirectoryError):
        sync_folder(place / "file")


def test_unsafe_file_error_is_an_os_error_and_a_shards_error(tmp_path: Path) -> None:
    error: OSError = pickle.loads(pickle.dumps(UnsafeFileError(errno.EINVAL, "a pipe\nof odd name", tmp_path)))
    assert (error.errno, error.filename) == (errno.EINVAL, str(tmp_path))
    assert isinstance(error, ShardsError)
    assert str(error) == f"{tmp_path}: a pipe\\nof odd name"
