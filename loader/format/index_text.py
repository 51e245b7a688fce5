"""The text of index.json: text → Index with every check that makes mapping safe, and Index → text."""

import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader.format import layout as fmt
from loader.format.layout import Index, LrOrigin, Plane, Shard, Strings
from loader.format.strict_json import Fields, fail, load

SHARD_ROOM = 64 << 10  # bytes that a shard may have beyond its runs (HDF5's metadata),
RUN_ROOM = 16 << 10  # and for each run (HDF5 needs 1.5 KiB or so, and the name)


def parse_index(text: bytes, where: str) -> Index:
    """Parse and check the text of index.json, without looking at the shards' files.

    Args:
        text: the file's bytes.
        where: the file's path, for messages.

    Raises:
        FormatError: naming `where`, the record, what was expected and what was got.
    """
    body = memoryview(text)[: -len(last_lines("0" * 64))]  # no copy
    if text[len(body) :] != _digest_line(body):
        _check_version(text, where)
        fail(where, "sha256", "as last line the SHA-256 of all lines before it", ascii(text[len(body) :][:78]))
    top = Fields(load(text, where), where)
    top.equal("format", fmt.FORMAT)
    top.equal("version", fmt.VERSION)
    container = top.choice("container", tuple(fmt.CONTAINERS))
    made_by, libraries = top.text("made_by"), top.texts("libraries")
    lr = _lr_origin(top.object("lr"))
    images_per_shard = top.integer("images_per_shard", 1, 1 << 62)
    shards = tuple(_shards(top.objects("shards"), container))

    images = top.object("images")
    name = images.strings("name")
    _check_names(name, f"{where}: images")
    shard = images.integers("shard", len(name), 0, len(shards) - 1)
    height, width = (images.integers(key, len(name), 1, fmt.MAX_SIDE) for key in ("height", "width"))
    images.done()

    index = Index(
        container=container,
        made_by=made_by,
        libraries=libraries,
        lr=lr,
        images_per_shard=images_per_shard,
        shards=shards,
        name=Strings(name),
        shard=shard,
        height=height,
        width=width,
        planes=_planes(top.object("planes"), len(name), lr),
        sha256=top.digest("sha256"),
    )
    top.done()
    _check_counts(index, where)
    _check_runs(index, where)
    return index


def dump_index(index: Index) -> bytes:
    """The text of index.json: one line for each field, the last one the digest of the others."""
    top: dict[str, Any] = {
        "format": fmt.FORMAT,
        "version": fmt.VERSION,
        "container": index.container,
        "made_by": index.made_by,
        "libraries": dict(sorted(index.libraries.items())),
        "lr": describe_lr(index.lr),
        "images_per_shard": index.images_per_shard,
        "shards": [{"file": shard.file, "bytes": shard.bytes, "sha256": shard.sha256} for shard in index.shards],
        "images": {
            "name": list(index.name),
            "shard": index.shard.tolist(),
            "height": index.height.tolist(),
            "width": index.width.tolist(),
        },
        "planes": {fmt.plane_name(level): _plane_json(plane) for level, plane in index.planes.items()},
    }
    lines = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)},\n" for key, value in top.items())
    body = ("{\n" + "".join(lines)).encode()
    return body + _digest_line(body)


def describe_lr(origin: LrOrigin) -> dict[str, str]:
    """Return the origin of LR as index.json has it."""
    lr = {"made": origin.made}
    if origin.resize is not None and origin.border is not None:
        lr |= {"resize": origin.resize, "border": origin.border}
    return lr


def _digest_line(body: bytes | memoryview) -> bytes:
    return last_lines(hashlib.sha256(body).hexdigest())


def last_lines(digest: str) -> bytes:
    """Return the last lines of an index of that digest, which they state."""
    return f'"sha256": "{digest}"\n}}\n'.encode()


def _plane_json(plane: Plane) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "samples": fmt.SAMPLES,
        "channels": fmt.CHANNELS,
        "tile": plane.tile,
        "offset": plane.offset.tolist(),
        "crc32": plane.crc32.tolist(),
    }
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
    origin = LrOrigin(fields.choice("made", fmt.LR_KINDS))
    if origin.made == "imresize":
        resize, border = fields.choice("resize", fmt.RESIZES), fields.choice("border", fmt.BORDERS)
        origin = LrOrigin(origin.made, resize, border)
    fields.done()
    return origin


def _shards(records: list[Fields], container: str) -> Iterator[Shard]:
    last = -1
    for fields in records:
        file = fields.text("file")
        number = fmt.shard_number(file)
        if number is None or not file.endswith(fmt.CONTAINERS[container]):
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


def _planes(fields: Fields, count: int, lr: LrOrigin) -> dict[int, Plane]:
    planes = {fmt.HR: _plane(fields.object(fmt.plane_name(fmt.HR)), count, True)}
    for scale in () if lr.made == "none" else fmt.SCALES:
        if (name := fmt.plane_name(scale)) in fields:
            planes[scale] = _plane(fields.object(name), count, lr.made == "given")
    fields.done()
    if len(planes) == 1 and lr.made != "none":
        fail(fields.where, "LR", f"a plane for each scale, since LR is {lr.made}", "HR alone")
    return planes


def _plane(fields: Fields, count: int, has_source: bool) -> Plane:
    if (samples := fields.text("samples")) != fmt.SAMPLES:
        fail(fields.where, "samples", f"{fmt.SAMPLES}, which this srshards reads", ascii(samples[:80]))
    if (channels := fields.integer("channels", 1, 1 << 62)) != fmt.CHANNELS:
        fail(fields.where, "channels", f"{fmt.CHANNELS}, which this srshards reads", channels)
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


def _check_counts(index: Index, where: str) -> None:
    """No shard holds more images than the dataset has per shard."""
    counts = np.bincount(index.shard)
    if counts[most := int(counts.argmax())] > index.images_per_shard:
        fail(where, f"shards: {index.shards[most].file}", f"at most {index.images_per_shard} images", counts[most])


def _check_runs(index: Index, where: str) -> None:
    """Every run lies within its shard, on a page, and no two share a byte."""
    count, planes = len(index.name), list(index.planes)
    side = max(planes)
    if (small := np.flatnonzero(np.minimum(index.height, index.width) < side)).size:
        size = f"{index.height[small[0]]} × {index.width[small[0]]}"
        fail(where, f"image {index.name[small[0]]!r}", f"at least {side} × {side} pixels", size)
    shard = np.tile(index.shard, len(planes))
    start = np.concatenate([index.planes[level].offset for level in planes])
    end = start + np.concatenate([index.run_lengths(level) for level in planes])

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
