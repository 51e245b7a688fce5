"""index.json: it survives a round trip, and each way in which it can be wrong has its error."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from helpers import build, photograph, write_image

from loader.errors import FormatError
from loader.format import index as index_module
from loader.format import index_text
from loader.format.index import check_current, read_index, read_index_alone
from loader.format.index_text import dump_index, parse_index
from loader.format.layout import CONTAINERS, Strings, run_length, shard_file, shard_number
from loader.system import sparse as sparse_module
from loader.system.sparse import stored_bytes


def resign(fields: dict[str, Any]) -> bytes:
    """The text of an index of these fields, with the digest that belongs to them."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in fields.items() if key != "sha256"]
    body = ("{\n" + "".join(lines)).encode()
    return body + f'"sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


@pytest.fixture
def fields(dataset: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((dataset / "index.json").read_text(encoding="utf-8"))
    return value


def test_round_trip(dataset: Path) -> None:
    text = (dataset / "index.json").read_bytes()
    index = parse_index(text, "here")
    assert dump_index(index) == text
    assert list(index.name) == ["a", "b", "c", "d e", "ü"]
    assert index.sizes(3)[0].tolist() == [42, 43, 21, 21, 66]
    assert index.scales == (2, 3, 4)
    assert index.images_per_shard == 2
    assert index.libraries["OpenCV"] == cv2.__version__
    assert [*index.libraries] == (["HDF5", "OpenCV"] if index.container == "hdf5" else ["OpenCV"])
    assert index.sha256 == hashlib.sha256(text[: text.rindex(b'"sha256": "')]).hexdigest()


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """An edit that puts a value at a place such as images.height.0; `...` removes what is there."""

    def edit(fields: dict[str, Any]) -> None:
        *inner, last = path.split(".")
        place: Any = fields
        for key in inner:
            place = place[int(key) if isinstance(place, list) else key]
        if value is ...:
            del place[int(last) if isinstance(place, list) else last]
        else:
            place[int(last) if isinstance(place, list) else last] = value

    return edit


EDITS = {
    "format": (change("format", "zarr"), "format: expected 'srshards', got str 'zarr'"),
    "version": (change("version", 2), "version: expected 1, got int 2"),
    "version type": (change("version", True), "version: expected int, got bool True"),
    "container": (change("container", "zip"), "container: expected one of hdf5, raw, got str 'zip'"),
    "made by half a surrogate": (change("made_by", "\ud800"), "made_by: expected text that UTF-8 can hold"),
    "unknown field": (change("extra", 1), "fields: expected no others, got 'extra'"),
    "unknown lr field": (change("lr.extra", 1), "lr: fields: expected no others, got 'extra'"),
    "unknown shard field": (change("shards.1.extra", 1), r"shards\[1\]: fields: expected no others, got 'extra'"),
    "unknown images field": (change("images.extra", [1] * 5), "images: fields: expected no others, got 'extra'"),
    "unknown HR field": (change("planes.HR.extra", 1), "planes: HR: fields: expected no others, got 'extra'"),
    "unknown LR field": (change("planes.X3.extra", 1), "planes: X3: fields: expected no others, got 'extra'"),
    "lr made": (change("lr.made", "pillow"), "lr: made: expected one of imresize, given, none, got str 'pillow'"),
    "lr none with resize": (change("lr.made", "none"), "lr: fields: expected no others, got 'resize', 'border'"),
    "lr none with planes": (change("lr", {"made": "none"}), "planes: fields: expected no others, got 'X2', 'X3', 'X4'"),
    "lr without planes": (
        lambda f: [f["planes"].pop(key) for key in ("X2", "X3", "X4")],
        "planes: LR: expected a plane for each scale, since LR is imresize, got HR alone",
    ),
    "library no text": (change("libraries.OpenCV", 5), "libraries: OpenCV: expected str, got int 5"),
    "library half a surrogate": (change("libraries.OpenCV", "\ud800"), "OpenCV: expected text that UTF-8 can hold"),
    "libraries a list": (change("libraries", ["OpenCV 5"]), "libraries: expected dict, got list"),
    "libraries out of order": (change("libraries", {"b": "", "a": ""}), "keys in ascending order, got 'b', 'a'"),
    "images per shard": (change("images_per_shard", 0), "images_per_shard: expected 1 to .*, got int 0"),
    "shard too full": (change("images_per_shard", 1), r"shards: shard-00000.\w+: expected at most 1 images, got 2"),
    "other samples": (
        change("planes.HR.samples", "uint16"), "HR: samples: expected uint8, which this srshards reads, got 'uint16'",
    ),
    "other samples in LR": (change("planes.X4.samples", "float32"), "X4: samples: expected uint8, .* got 'float32'"),
    "samples no text": (change("planes.HR.samples", 8), "HR: samples: expected str, got int 8"),
    "other channels": (
        change("planes.X2.channels", 1), "X2: channels: expected 3, which this srshards reads, got 1",
    ),
    "no channels": (change("planes.HR.channels", 0), "HR: channels: expected 1 to .*, got int 0"),
    "missing field": (change("shards", ...), "shards: expected this field, got none"),
    "shard no object": (change("shards.0", 7), r"shards\[0\]: value: expected an object, got int"),
    "absolute path": (change("shards.0.file", "/etc/passwd"), r"shards\[0\]: file: expected a name such as"),
    "path upwards": (change("shards.0.file", "../shard-00000.h5"), r"shards\[0\]: file: expected a name such as"),
    "shard twice": (lambda f: f["shards"].insert(1, f["shards"][0]), r"shards\[1\]: file: expected a number after 0"),
    "negative length": (change("shards.0.bytes", -1), r"shards\[0\]: bytes: expected 1 to .*, got int -1"),
    "length huge": (change("shards.0.bytes", 10**300), r"shards\[0\]: bytes: expected 1 to .*, got int 1000"),
    "no shards": (change("shards", []), r"shard\[0\]: expected 0 to -1, got int 0"),
    "short digest": (change("shards.0.sha256", "ab"), r"shards\[0\]: sha256: expected 64 hex digits"),
    "no images": (change("images.name", []), "name: expected at least one image, got none"),
    "name twice": (change("images.name.1", "a"), "name: expected each name once, got 'a' twice"),
    "name with slash": (change("images.name.1", "x/y"), r"name\[1\]: expected the stem"),
    "name empty": (change("images.name.1", ""), r"name\[1\]: expected the stem"),
    "name with a null": (change("images.name.1", "a\0b"), r"name\[1\]: expected the stem"),
    "name upwards": (change("images.name.1", ".."), r"name\[1\]: expected the stem"),
    "name endless": (change("images.name.1", "x" * 1025), r"name\[1\]: expected the stem .*, got 'xxx"),
    "name half a surrogate": (change("images.name.1", "\ud800"), "name: expected text that UTF-8 can hold"),
    "height negative": (change("images.height.1", -5), r"height\[1\]: expected 1 to 1048576, got int -5"),
    "height zero": (change("images.height.1", 0), r"height\[1\]: expected 1 to 1048576, got int 0"),
    "height huge": (change("images.height.1", 10**30), r"height\[1\]: expected 1 to 1048576, got int 1000"),
    "height text": (change("images.height.1", "9"), r"height\[1\]: expected int, got str '9'"),
    "height true": (change("images.height.1", True), r"height\[1\]: expected int, got bool True"),
    "height missing": (change("images.height.1", ...), "height: expected 5 entries, one per image, got 4"),
    "float": (change("images.height.1", 1.5), "number: expected integers only, got 1.5"),
    "NaN": (change("images.height.1", float("nan")), "number: expected integers only, got NaN"),
    "Infinity": (change("images.height.1", float("inf")), "number: expected integers only, got Infinity"),
    "list in place of a number": (change("images.height.1", [[]] * 999), r"height\[1\]: expected int, got list \[\[\]"),
    "shard negative": (change("images.shard.4", -1), r"shard\[4\]: expected 0 to 2, got int -1"),
    "shard number": (change("images.shard.4", 3), r"shard\[4\]: expected 0 to 2, got int 3"),
    "too small for ×4": (change("images.width.2", 3), "image 'c': expected at least 4 × 4 pixels, got 64 × 3"),
    "no HR": (change("planes.HR", ...), "HR: expected this field, got none"),
    "unknown plane": (change("planes.X5", {}), "planes: fields: expected no others, got 'X5'"),
    "tile odd": (change("planes.X2.tile", 33), "planes: X2: tile: expected a multiple of 16, got 33"),
    "tile huge": (change("planes.X2.tile", 4096), "tile: expected 16 to 1024"),
    "LR with source": (change("planes.X2.source", ["a"] * 5), "X2: fields: expected no others, got 'source'"),
    "crc": (change("planes.X2.crc32.0", 1 << 32), r"crc32\[0\]: expected 0 to 4294967295"),
    "source digest": (change("planes.HR.source_sha256.3", "0" * 63 + "g"), r"source_sha256\[3\]: expected 64 hex"),
    "source absolute": (change("planes.HR.source.1", "/etc/passwd"), r"HR: source\[1\]: expected a path within"),
    "source upwards": (change("planes.HR.source.1", "a/../../b.png"), r"HR: source\[1\]: expected a path within"),
    "source empty": (change("planes.HR.source.1", ""), r"HR: source\[1\]: expected a path within"),
    "source missing": (change("planes.HR.source", ...), "HR: source: expected this field, got none"),
    "offset negative": (change("planes.X4.offset.2", -4096), r"offset\[2\]: expected 0 to .*, got int -4096"),
    "offset huge": (change("planes.X4.offset.2", 1 << 63), r"offset\[2\]: expected 0 to .*, got int 9223372"),
    "offset unaligned": (change("planes.X4.offset.2", 4097), "X4 of image 'c': expected an offset that is a multiple"),
    "offset outside": (change("planes.X4.offset.2", 1 << 40), "X4 of image 'c': expected a run within the .* bytes of"),
    "overlap": (
        lambda f: f["planes"]["X4"]["offset"].__setitem__(0, f["planes"]["HR"]["offset"][0]),
        "of image 'a': expected a start at .* or later",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", EDITS)
def test_wrong_fields(fields: dict[str, Any], case: str) -> None:
    edit, message = EDITS[case]
    edit(fields)
    with pytest.raises(FormatError, match=message) as caught:
        parse_index(resign(fields), "some/index.json")
    assert str(caught.value).startswith("some/index.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "start: expected"),
        (b"\x89HDF\r\n", "start: expected"),
        (b'{\n"format": "srshards",\n"version": 99,\n"new": 1\n}\n', "version: expected 1, .* got '99'"),
        (b"{\n" + b'"a": ' * 3 + b"[" * 100_000, "start: expected"),
    ],
)
def test_wrong_text(text: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_index(text, "here")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[" * 100_000, "expected a JSON object"),
        (b'{\n"a": ' + b"9" * 5000 + b",\n", "expected a JSON object"),
        (b'{\n"a": 1,\n"a": 2,\n', "each key once, got 'a' twice"),
        (b"{\n" + b"".join(b'"%d": 1,\n' % (i % 199_999) for i in range(200_000)), "each key once, got '0' twice"),
        (b'{\n"' + b"a" * 10**6 + b'": 1,\n', r"expected 'srshards'|format: expected this field"),
        (b'{\n"format": ' + b"[[]," * 1 + b"[]," * 10**6 + b"[]],\n", r"format: expected str, got list \[\[\]"),
        (b'{\n"a": "\xff",\n', "expected a JSON object in UTF-8"),
        (b"[1,\n", "expected a JSON object"),
    ],
)
def test_wrong_json(body: bytes, message: str) -> None:
    """Text that ends in its right digest, yet is not what it should be."""
    text = body + f'"sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()
    with pytest.raises(FormatError, match=message) as caught:
        parse_index(text, "here")
    assert len(str(caught.value)) < 300


def test_any_changed_byte_is_found(dataset: Path) -> None:
    text = (dataset / "index.json").read_bytes()
    for at in np.linspace(0, len(text) - 1, 150).astype(int):
        changed = bytearray(text)
        changed[at] ^= 1
        with pytest.raises(FormatError):
            parse_index(bytes(changed), "here")
    for length in (0, 1, 2, 77, 78, 79, len(text) - 1):
        with pytest.raises(FormatError):
            parse_index(text[:length], "here")
    with pytest.raises(FormatError):
        parse_index(text + b"\n", "here")


def test_files_beside_the_index(dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    shard = copy / read_index(copy).shards[1].file
    data = shard.read_bytes()

    shard.write_bytes(data[:-1])
    with pytest.raises(FormatError, match=f"{shard.name}: length: expected a file of {len(data)} bytes, got"):
        read_index(copy)
    shard.write_bytes(data + b"\0")
    with pytest.raises(FormatError, match=f"got {len(data) + 1} bytes"):
        read_index(copy)
    shard.unlink()
    with pytest.raises(FormatError, match=rf"{shard.name}: expected a file of .* got No such file"):
        read_index(copy)
    shard.mkdir()
    with pytest.raises(FormatError, match=f"{shard.name}: file: expected a file in this folder, got a folder"):
        read_index(copy)
    shard.rmdir()
    (tmp_path / "elsewhere").write_bytes(data)
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="expected a file in this folder, got a link to"):
        read_index(copy)


def test_lengths_are_known_before_anything_is_mapped(dataset: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    """An index that claims more than the shards have."""
    shutil.copytree(dataset, tmp_path / "copy")
    claimed = fields["shards"][1]["bytes"] + 4096
    fields["shards"][1]["bytes"] = claimed
    (tmp_path / "copy/index.json").write_bytes(resign(fields))
    with pytest.raises(FormatError, match=rf"length: expected a file of {claimed} bytes, got \d+ bytes"):
        read_index(tmp_path / "copy")


@pytest.mark.parametrize("claimed", [1 << 61, 1 << 43, 1 << 20])
def test_a_shard_much_longer_than_its_runs(dataset: Path, tmp_path: Path, fields: dict[str, Any], claimed: int) -> None:
    """Holes cost nothing, so that a shard may really have 2^43 bytes; `prep verify` would read them for weeks."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    shard = fields["shards"][2]
    shard["bytes"] += claimed
    with contextlib.suppress(OSError):  # file systems differ in what they can have
        os.truncate(copy / shard["file"], shard["bytes"])
    (copy / "index.json").write_bytes(resign(fields))
    for read in (read_index, read_index_alone):
        with pytest.raises(FormatError, match=rf"{shard['file']}: expected at most \d+ bytes for its runs, got \d+ b"):
            read(copy)


def test_shards_of_many_small_images_with_long_names_are_short_enough(tmp_path: Path) -> None:
    """The most that HDF5 adds to runs: tiny images, all scales, names as long as file systems have them."""
    for i in range(40):
        write_image(tmp_path / "in" / f"{i:0240d}.png", photograph(8, 8, i))
    for count in (1, 40):
        out = build(tmp_path / "in", tmp_path / str(count), images_per_shard=count, tile=16, scales=(2, 3, 4, 8))
        index = read_index(out)
        runs = 40 * len(index.planes)
        extra = sum(shard.bytes for shard in index.shards) - runs * 4096
        assert extra < runs * index_text.RUN_ROOM / 4 + len(index.shards) * index_text.SHARD_ROOM / 4


def test_links(dataset: Path, tmp_path: Path) -> None:
    """Links stay in the folder; the folder itself may be one."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    (tmp_path / "link").symlink_to(copy)
    index, shard = copy / "index.json", copy / read_index(tmp_path / "link").shards[0].file
    shard.rename(copy / "aside")
    shard.symlink_to("aside")
    read_index(tmp_path / "link")
    (copy / "aside").replace(shard)
    for path in (index, shard):
        path.rename(tmp_path / "outside")
        path.symlink_to(path.name)
        with pytest.raises(FormatError, match=f"{path.name}: expected a .*, got Too many levels of symbolic links"):
            read_index(copy)
        path.unlink()
        path.symlink_to("../outside")
        with pytest.raises(
            FormatError, match=f"{path.name}: file: expected a file in this folder, got a link to .*out"
        ):
            read_index(copy)
        path.unlink()
        (tmp_path / "outside").rename(path)


def test_pipes_are_not_waited_for(dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    shard = copy / read_index(copy).shards[0].file
    for path in (shard, copy / "index.json"):
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(FormatError, match=f"{path.name}: file: expected a file in this folder, got a pipe, no"):
            read_index(copy)


def sparse(path: Path, *lengths: int) -> None:
    """Make a file as long as the file system can have it, up to the last length, without writing anything."""
    path.touch()
    for length in lengths:
        with contextlib.suppress(OSError):
            os.truncate(path, length)


def test_an_index_too_large_for_its_shards(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused unread: a terabyte of holes takes no time."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    text = (copy / "index.json").read_bytes()
    sparse(copy / "index.json", 1 << 32, 1 << 40)
    shards = sum(path.stat().st_size for path in copy.glob("shard-*"))
    most = (16 << 20) + shards // 8
    with pytest.raises(FormatError, match=rf"index.json: length: expected at most {most} bytes, .*, got \d+ bytes"):
        read_index(copy)
    (copy / "index.json").write_bytes(text)
    monkeypatch.setattr(index_module, "INDEX_ROOM", len(text) - shards // 8)
    read_index(copy)
    monkeypatch.setattr(index_module, "INDEX_ROOM", len(text) - shards // 8 - 1)
    with pytest.raises(FormatError, match=f"expected at most {len(text) - 1} bytes"):
        read_index(copy)
    (copy / "shard-1").symlink_to("/dev/zero")  # nor does what is no file count, nor wait
    os.mkfifo(copy / "shard-2")
    with pytest.raises(FormatError, match=f"expected at most {len(text) - 1} bytes"):
        read_index(copy)


def test_holes_in_shards_are_no_shards(dataset: Path, tmp_path: Path) -> None:
    """100 GB of holes give an index no room, and an absolute bound holds whatever there is."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    shard = next(copy.glob("shard-*"))
    data = sum(path.stat().st_size for path in copy.glob("shard-*"))
    sparse(copy / "shard-99999.raw", 100 << 30)
    sparse(shard, 100 << 30)
    sparse(copy / "index.json", 3 << 30)
    with pytest.raises(
        FormatError, match=r"index.json: length: expected at most (\d+) bytes, .*, got 3221225472"
    ) as got:
        read_index(copy)
    most = int(str(got.value).split("at most ")[1].split()[0])
    assert (16 << 20) <= most <= (16 << 20) + data // 8 + 4096
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "stored_bytes", lambda folder, start, enough: enough)
        sparse(copy / "index.json", (1 << 30) + 1)
        with pytest.raises(FormatError, match=rf"expected at most {1 << 30} bytes"):
            read_index(copy)


def test_a_file_system_without_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There all of a file counts as data, so that no honest dataset is refused."""
    (tmp_path / "shard-0").write_bytes(bytes(10_000))
    (tmp_path / "shard-1").write_bytes(bytes(10_000))
    (tmp_path / "other").write_bytes(bytes(10_000))
    assert stored_bytes(tmp_path, "shard-", 1 << 40) == 20_000
    assert stored_bytes(tmp_path, "shard-", 1) == 10_000
    monkeypatch.setattr(os, "lseek", lambda *_: (_ for _ in ()).throw(OSError(errno.EINVAL, "Invalid argument")))
    assert stored_bytes(tmp_path, "shard-", 1 << 40) == 20_000


def test_data_between_holes_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "shard-0").open("wb") as file:
        for i in range(5):
            file.seek(i << 20)
            file.write(b"x" * 4096)
        file.truncate(1 << 30)
    assert stored_bytes(tmp_path, "shard-", 1 << 40) == 5 * 4096
    monkeypatch.setattr(sparse_module, "EXTENTS", 3)
    assert stored_bytes(tmp_path, "shard-", 1 << 40) == 3 * 4096


def test_holes_in_an_index_end_its_reading(dataset: Path, tmp_path: Path) -> None:
    """A hole with the right start, and the right end: nothing of it is held in memory."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    text = (copy / "index.json").read_bytes()
    with (copy / "index.json").open("r+b") as file:
        file.truncate(80)
        file.seek((16 << 20) - 78)
        file.write(text[-78:])
    with pytest.raises(FormatError, match="index.json: text: expected no zero bytes, got one at byte 80"):
        read_index(copy)


def test_an_index_that_memory_cannot_hold() -> None:
    """One line, where the process may not have more memory."""
    code = (
        "import resource, sys\nfrom pathlib import Path\nimport loader.format.index_text as index\n"
        "from loader.errors import FormatError\n"
        "body = b'{\\n\"format\": [' + b'[],' * 6_000_000 + b'0],\\n'\n"
        "text = body + index._digest_line(body)\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (60 << 20),) * 2)\n"
        "try: index.parse_index(text, 'here')\n"
        "except FormatError as error: print(error)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert run.stdout == "here: expected a JSON object in UTF-8, got MemoryError\n", run.stderr


@pytest.mark.parametrize("depth", [900, 5_000, 200_000])
def test_json_of_any_depth(depth: int) -> None:
    """A field of deep lists or objects, under the digest that fits, is one line, in whatever depth it is met."""
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        inner = opening * depth + b"1" + closing * depth
        for body in (b'{\n"format": ' + inner + b",\n", b'{\n"images": ' + inner + b",\n"):
            text = body + f'"sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()
            with pytest.raises(FormatError) as caught:
                parse_index(text, "here")
            assert str(caught.value).isprintable()
            assert len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "socket", "link out", "link to itself", "nowhere"])
@pytest.mark.parametrize("when", ["index", "shard", "index after opening"])
def test_what_is_no_file(dataset: Path, tmp_path: Path, kind: str, when: str) -> None:
    """Whatever lies there instead of a file: nothing waits, and it is one line."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    index = read_index(copy)
    path = copy / (index.shards[0].file if when == "shard" else "index.json")
    path.rename(tmp_path / "outside")
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(os.path.relpath(path))
        case "link out":
            path.symlink_to("../outside")
        case "link to itself":
            path.symlink_to(path.name)
    read = partial(check_current, copy, index) if when == "index after opening" else partial(read_index, copy)
    with pytest.raises(FormatError, match=": expected .*, got ") as caught:
        read()
    assert str(caught.value).startswith(str(copy))


def test_no_dataset_there(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FormatError, match="expected a dataset, a folder with index.json, got none there"):
            read_index(place)
    (tmp_path / "index.json").mkdir()
    with pytest.raises(FormatError, match="expected a file in this folder, got a folder"):
        read_index(tmp_path)


def test_shard_names() -> None:
    for number in (0, 7, 99_999, 100_000, 123_456_789):
        for container in CONTAINERS:
            assert shard_number(shard_file(number, container)) == number
    for name in ("", "shard-", "shard-0001.h5", "shard-000001.h5", "shard-00001.h5.part", "shard-00001.zip",
                 "xshard-00001.h5", "shard-\u0661\u0661\u0661\u0661\u0661.h5", "shard-00001.h5\n", "shard--0001.raw",
                 f"shard-{'1' * 16}.h5"):  # fmt: skip
        assert shard_number(name) is None


def test_run_lengths_of_numbers_and_arrays() -> None:
    height, width = np.array([1, 64, 65, 1 << 20]), np.array([1, 128, 129, 1 << 20])
    lengths = run_length(height, width, 64)
    assert lengths.tolist() == [run_length(int(h), int(w), 64) for h, w in zip(height, width, strict=True)]
    assert lengths.tolist() == [64 * 64 * 3 * tiles for tiles in (1, 2, 6, 1 << 28)]


def test_strings_are_a_sequence() -> None:
    words = ["", "a", "zwölf", "日本"]
    column = Strings(words)
    assert list(column) == words
    assert column[1:3] == words[1:3]
    assert column[-1] == "日本"
    assert "zwölf" in column
    with pytest.raises(IndexError):
        column[4]
    assert list(Strings([])) == []
