"""index.json, read and written: text → Index with every check that makes mapping safe, and Index → text."""

import hashlib
import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader.errors import FormatError
from loader.format import layout as fmt
from loader.format.layout import Index, LrOrigin, Plane, Shard, Strings
from loader.format.strict_json import Fields, fail, load
from loader.system.safefile import UnsafeFileError, open_member
from loader.system.sparse import stored_bytes

INDEX_ROOM = 16 << 20  # bytes that an index may have in any case,
INDEX_SHARE = 8  # and this part of its shards' bytes beyond,
INDEX_MOST = 1 << 30  # up to this, which some seven million images need
SHARD_ROOM = 64 << 10  # bytes that a shard may have beyond its runs (HDF5's metadata),
RUN_ROOM = 16 << 10  # and for each run (HDF5 needs 1.5 KiB or so, and the name)
BLOCK = 1 << 20


def read_index(folder: Path) -> Index:
    """Read, check and compare with the files beside it the index of a dataset.

    Raises:
        FormatError: naming the file, the record, what was expected and what was got.
    """
    index = read_index_alone(folder)
    for shard in index.shards:
        check_file(folder, shard)
    return index


def read_index_alone(folder: Path) -> Index:
    """The index of a dataset, read and checked as far as it goes without the shards' files.

    Raises:
        FormatError: as `read_index`.
    """
    path = folder / fmt.INDEX
    try:
        return parse_index(_read_text(folder, path), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise FormatError(f"{folder}: expected a dataset, a folder with {fmt.INDEX}, got none there") from None
    except UnsafeFileError as error:
        fail(str(path), "file", "a file in this folder", error.strerror)
    except OSError as error:
        raise FormatError(f"{path}: expected a readable file, got {error.strerror}") from None
    except MemoryError:
        fail(str(path), "length", "an index that fits into memory", "one that does not")


def check_current(folder: Path, index: Index) -> None:
    """Hold that the index of a dataset is still the one that was read.

    Raises:
        FormatError: it is gone, or another.
    """
    wanted = _last_lines(index.sha256)
    try:
        descriptor = open_member(folder / fmt.INDEX)
        try:
            start = max(os.fstat(descriptor).st_size - len(wanted), 0)
            if os.pread(descriptor, len(wanted) + 1, start) == wanted:
                return
        finally:
            os.close(descriptor)
    except OSError as error:
        raise FormatError(f"{folder}: expected the dataset opened before, got {error.strerror}") from None
    raise FormatError(f"{folder}: expected the dataset opened before, got one built since")


def check_file(folder: Path, shard: Shard) -> None:
    """Hold that a shard is there, a regular file of this folder, of the length recorded.

    Raises:
        FormatError: it is not.
    """
    path = folder / shard.file
    try:
        descriptor = open_member(path)
    except UnsafeFileError as error:
        fail(str(path), "file", "a file in this folder", error.strerror)
    except OSError as error:
        raise FormatError(f"{path}: expected a file of {shard.bytes} bytes, got {error.strerror}") from None
    try:
        length = os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    if length != shard.bytes:
        fail(str(path), "length", f"a file of {shard.bytes} bytes", f"{length} bytes")


def _read_text(folder: Path, path: Path) -> bytes:
    """The bytes of an index, read only as far as they can be those of one: holes in a file read as zeros."""
    descriptor = open_member(path)
    try:
        length = os.fstat(descriptor).st_size
        if length > (most := _longest(folder, length)):
            fail(str(path), "length", f"at most {most} bytes, as the shards beside it are", f"{length} bytes")
        text = bytearray()
        while len(text) <= length and (block := os.read(descriptor, BLOCK)):
            if (zero := block.find(0)) >= 0:
                fail(str(path), "text", "no zero bytes", f"one at byte {len(text) + zero}")
            text += block
        return bytes(text)
    finally:
        os.close(descriptor)


def _longest(folder: Path, length: int) -> int:
    """Bytes that an index may have: what it says of an image is far less than the image's own runs, which fill pages.

    Parsing takes up to 45 times as much memory; what came from elsewhere shall not take it all.
    """
    wanted = (min(length, INDEX_MOST) - INDEX_ROOM) * INDEX_SHARE
    data = stored_bytes(folder, "shard-", wanted) if wanted > 0 else 0
    return min(INDEX_ROOM + data // INDEX_SHARE, INDEX_MOST)


def parse_index(text: bytes, where: str) -> Index:
    """Parse and check the text of index.json, without looking at the shards' files.

    Args:
        text: the file's bytes.
        where: the file's path, for messages.

    Raises:
        FormatError: naming `where`, the record, what was expected and what was got.
    """
    body = memoryview(text)[: -len(_last_lines("0" * 64))]  # no copy
    if text[len(body) :] != _digest_line(body):
        _check_version(text, where)
        fail(where, "sha256", "as last line the SHA-256 of all lines before it", ascii(text[len(body) :][:78]))
    top = Fields(load(text, where), where)
    top.equal("format", fmt.FORMAT)
    top.equal("version", fmt.VERSION)
    container = top.choice("container", tuple(fmt.CONTAINERS))
    made_by = top.text("made_by")
    lr = _lr_origin(top.object("lr"))
    shards = tuple(_shards(top.objects("shards"), container))

    images = top.object("images")
    name = images.strings("name")
    _check_names(name, f"{where}: images")
    shard = images.integers("shard", len(name), 0, len(shards) - 1)
    height, width = (images.integers(key, len(name), 1, fmt.MAX_SIDE) for key in ("height", "width"))
    images.done()

    fields = top.object("planes")
    planes = {}
    for scale in (fmt.HR, *fmt.SCALES):
        if scale == fmt.HR or fmt.plane_name(scale) in fields:
            has_source = scale == fmt.HR or lr.made == "given"
            planes[scale] = _plane(fields.object(fmt.plane_name(scale)), len(name), has_source)
    fields.done()
    index = Index(container, made_by, lr, shards, Strings(name), shard, height, width, planes, top.digest("sha256"))
    top.done()
    _check_runs(index, where)
    return index


def dump_index(index: Index) -> bytes:
    """The text of index.json: one line for each field, the last one the digest of the others."""
    top: dict[str, Any] = {
        "format": fmt.FORMAT,
        "version": fmt.VERSION,
        "container": index.container,
        "made_by": index.made_by,
        "lr": {key: value for key, value in vars(index.lr).items() if value is not None},
        "shards": [vars(shard) for shard in index.shards],
        "images": {
            "name": list(index.name),
            "shard": index.shard.tolist(),
            "height": index.height.tolist(),
            "width": index.width.tolist(),
        },
        "planes": {fmt.plane_name(scale): _plane_json(plane) for scale, plane in index.planes.items()},
    }
    lines = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)},\n" for key, value in top.items())
    body = ("{\n" + "".join(lines)).encode()
    return body + _digest_line(body)


def _digest_line(body: bytes | memoryview) -> bytes:
    return _last_lines(hashlib.sha256(body).hexdigest())


def _last_lines(digest: str) -> bytes:
    return f'"sha256": "{digest}"\n}}\n'.encode()


def _plane_json(plane: Plane) -> dict[str, Any]:
    columns: dict[str, Any] = {"tile": plane.tile, "offset": plane.offset.tolist(), "crc32": plane.crc32.tolist()}
    if plane.source is not None and plane.source_sha256 is not None:
        columns |= {"source": list(plane.source), "source_sha256": list(plane.source_sha256)}
    return columns


def _check_version(text: bytes, where: str) -> None:
    """Another version may end otherwise: then the version is what to report, not the digest."""
    start = f'{{\n"format": "{fmt.FORMAT}",\n"version": '.encode()
    if not text.startswith(start):
        fail(where, "start", ascii(start.decode()), ascii(text[: len(start)].decode(errors="replace")))
    version = text[len(start) : len(start) + 9].split(b",")[0].decode(errors="replace")
    if version != str(fmt.VERSION):
        fail(where, "version", f"{fmt.VERSION}, the one that this srshards reads", ascii(version))


def _lr_origin(fields: Fields) -> LrOrigin:
    origin = LrOrigin(fields.choice("made", ("imresize", "given")))
    if origin.made == "imresize":
        resize, border = fields.choice("resize", fmt.RESIZES), fields.choice("border", fmt.BORDERS)
        origin = LrOrigin(origin.made, resize, border)
    fields.done()
    return origin


def _shards(records: list[Fields], container: str) -> Iterator[Shard]:
    last = -1
    for fields in records:
        file = fields.text("file")
        digits = file.removeprefix("shard-").removesuffix(fmt.CONTAINERS[container])
        number = int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 16 else -1
        if number < 0 or file != fmt.shard_file(number, container):
            fail(fields.where, "file", f"a name such as {fmt.shard_file(0, container)}", ascii(file[:80]))
        if number <= last:
            fail(fields.where, "file", f"a number after {last}", ascii(file))
        last = number
        yield Shard(file, fields.integer("bytes", 1, 1 << 62), fields.digest("sha256"))
        fields.done()


def _check_names(names: list[str], where: str) -> None:
    if not names:
        fail(where, "name", "at least one image", "none")
    for i, name in enumerate(names):
        if not fmt.is_image_name(name):
            fail(where, f"name[{i}]", "the stem of a file's name", ascii(name[:80]))
    if len(set(names)) < len(names):
        ordered = sorted(names)
        fail(where, "name", "each name once", f"{next(a for a, b in pairwise(ordered) if a == b)!r} twice")


def _plane(fields: Fields, count: int, has_source: bool) -> Plane:
    tile = fields.integer("tile", *fmt.TILES)
    if tile % 16:
        fail(fields.where, "tile", "a multiple of 16", tile)
    offset = fields.integers("offset", count, 0, 1 << 62)
    crc32 = fields.integers("crc32", count, 0, 0xFFFFFFFF)
    source = source_sha256 = None
    if has_source:
        names = fields.strings("source", count)
        if (i := next((i for i, name in enumerate(names) if not fmt.is_source_name(name)), None)) is not None:
            fail(fields.where, f"source[{i}]", "a path within the folder of sources", ascii(names[i][:80]))
        source = Strings(names)
        source_sha256 = Strings(fields.digests("source_sha256", count))
    fields.done()
    return Plane(tile, offset, crc32, source, source_sha256)


def _check_runs(index: Index, where: str) -> None:
    """Every run lies within its shard, on a page, and no two share a byte."""
    count, planes = len(index.name), list(index.planes)
    side = max(planes)
    if (small := np.flatnonzero(np.minimum(index.height, index.width) < side)).size:
        size = f"{index.height[small[0]]} × {index.width[small[0]]}"
        fail(where, f"image {index.name[small[0]]!r}", f"at least {side} × {side} pixels", size)
    shard = np.tile(index.shard, len(planes))
    start = np.concatenate([index.planes[scale].offset for scale in planes])
    end = start + np.concatenate([index.run_lengths(scale) for scale in planes])

    def run(k: np.int64) -> str:
        return f"{fmt.plane_name(planes[k // count])} of image {index.name[int(k % count)]!r}"

    if (bad := np.flatnonzero(start % fmt.PAGE)).size:
        fail(where, run(bad[0]), f"an offset that is a multiple of {fmt.PAGE}", start[bad[0]])
    if (bad := np.flatnonzero(end > np.array([entry.bytes for entry in index.shards])[shard])).size:
        k, entry = bad[0], index.shards[shard[bad[0]]]
        fail(where, run(k), f"a run within the {entry.bytes} bytes of {entry.file}", f"bytes {start[k]} to {end[k]}")
    order = np.lexsort((start, shard))
    overlap = (shard[order][1:] == shard[order][:-1]) & (start[order][1:] < end[order][:-1])
    if (bad := np.flatnonzero(overlap)).size:
        first, second = order[bad[0]], order[bad[0] + 1]
        fail(where, run(second), f"a start at {end[first]}, the end of {run(first)}, or later", start[second])
    _check_lengths(index, shard, end - start, where)


def _check_lengths(index: Index, shard: NDArray[np.int64], lengths: NDArray[np.int64], where: str) -> None:
    """No shard is much longer than its runs: whoever checks it reads it whole."""
    most = np.full(len(index.shards), SHARD_ROOM, np.int64)
    np.add.at(most, shard, -(-lengths // fmt.PAGE) * fmt.PAGE + RUN_ROOM)
    for entry, limit in zip(index.shards, most.tolist(), strict=True):
        if entry.bytes > limit:
            fail(where, f"shards: {entry.file}", f"at most {limit} bytes for its runs", f"{entry.bytes} bytes")
