"""Valid inputs, changed at random with an eye to their structure: readers may refuse them, in their own words only.

A few seconds of each here; `make fuzz` takes minutes, with a seed of its own. Input n of a seed is always the same.
"""

import hashlib
import io
import json
import os
import random
import resource
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import build, photograph, write_image
from PIL import Image

from loader.format import FormatError, Index
from loader.index import dump_index, parse_index, read_index
from prep.check import GAP, spans
from prep.images import ImageError, decode
from prep.structure import check_structure

FUZZING = "SRSHARDS_FUZZ_SECONDS" in os.environ
SECONDS = float(os.environ.get("SRSHARDS_FUZZ_SECONDS", "6")) / 4  # for each of four
SEED = int(os.environ.get("SRSHARDS_FUZZ_SEED", "0"))
LEAST = 20  # inputs, however slow the machine is
MAX_PIXELS = 1 << 20  # of an image: what its header claims is not allocated beyond this
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")

Words = list[bytes]
EDGES: Words = [b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\xff\xff", b"\0\0\0\1", b"\1\0\0\0"]


def mutated(data: bytes, rng: random.Random, words: Words) -> bytes:
    """Some bytes changed, cut out, doubled, put in, or cut off; more often near the start, where headers are."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        if not out:
            break
        at = rng.randrange(min(len(out), rng.choice([16, 64, 256, 1 << 30])))
        length = rng.randrange(1, 40)
        match rng.randrange(7):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
            case 2:
                word = rng.choice(words)
                out[at : at + len(word)] = word
            case 3:
                del out[at : at + length]
            case 4:
                out[at:at] = out[at : at + length]
            case 5:
                out[at:at] = rng.choice(words)
            case _:
                if rng.random() < 0.3:
                    del out[at:]
    return bytes(out)


def fuzz(
    name: str, make: Callable[[random.Random], Any], meet: Callable[[Any], str], capfd: pytest.CaptureFixture[str]
) -> Counter[str]:
    """Make inputs and meet them until time is up; tell how many there were."""
    told, slowest, n = Counter[str](), 0.0, 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end or n < LEAST:
        given = make(random.Random(f"{SEED}/{n}"))
        start = time.monotonic()
        try:
            told[meet(given)] += 1
        except Exception as error:
            raise AssertionError(f"{name}: input {n} of seed {SEED} met {error!r}") from error
        slowest, n = max(slowest, time.monotonic() - start), n + 1
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    ends = ", ".join(f"{count} {what}" for what, count in sorted(told.items()))
    with capfd.disabled():
        if FUZZING:
            print(f"\n{name}: {n} inputs of seed {SEED} in {SECONDS:.0f} s: {ends}; "
                  f"the slowest took {slowest:.2f} s; most memory of the process {memory:.0f} MiB")  # fmt: skip
    return told


def refused(error: Exception, start: str) -> str:
    """Hold that an error is one line that says where."""
    text = str(error)
    assert text.startswith(start)
    assert text.isprintable()
    assert len(text) < 4000
    return "refused"


ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 15, 16, 17, 1 << 20, (1 << 20) + 1, 1 << 31, 1 << 62, 1 << 63, 1 << 64, 10**400,
    -(1 << 63), 0.5, 1e308, float("nan"), float("inf"), "", "a", "..", "../x", "/etc/passwd", "a/b", "\0", "\ud800",
    "ü" * 300, "0" * 64, "shard-00000.h5", "shard-99999.raw", [], [[]], [0], ["a"], {}, {"a": 1}, {"tile": 64},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values within one."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


def change_json(top: dict[str, Any], rng: random.Random) -> None:
    """Replace, remove, double or exchange a value somewhere."""
    *outer, last = rng.choice(places(top)[1:])
    inner: Any = top
    for key in outer:
        inner = inner[key]
    match rng.randrange(6):
        case 0 | 1:
            inner[last] = rng.choice(ODD)
        case 2 if isinstance(inner[last], int):
            inner[last] += rng.choice([-4096, -1, 1, 4096, 1 << 40])
        case 3:
            del inner[last]
        case 4 if isinstance(inner, list):
            inner.insert(last, inner[rng.randrange(len(inner))])
        case _:
            if isinstance(inner, list):
                other = rng.randrange(len(inner))
                inner[last], inner[other] = inner[other], inner[last]
            else:
                inner["other"] = inner[last]


def signed(body: bytes) -> bytes:
    return body + f'"sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def test_index(dataset: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The parser: JSON with other values, and text with other bytes, most of it under a digest that fits."""
    text = (dataset / "index.json").read_bytes()
    body = text[: text.rindex(b'"sha256": "')]
    words = [*EDGES, b'"', b"[", b"{", b"]", b"}", b",", b":", b"-", b"1e9", b"9" * 5000, b"[" * 3000, b"\\u0000",
             b'"a": 1,', b"\xff", b"\n", b"null", b"NaN", b'"HR"', b'"\\ud800"']  # fmt: skip

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return mutated(text, rng, words) if rng.random() < 0.2 else signed(mutated(body, rng, words))
        top = json.loads(text)
        del top["sha256"]
        for _ in range(rng.choice([1, 1, 2, 4])):
            if len(top) > 1:
                change_json(top, rng)
        lines = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in top.items())
        return signed(("{\n" + lines).encode())

    def meet(given: bytes) -> str:
        try:
            index = parse_index(given, "index.json")
        except FormatError as error:
            return refused(error, "index.json")
        hold(index)
        return "taken"

    told = fuzz(f"index ({dataset.name})", make, meet, capfd)
    assert told["refused"]


def hold(index: Index) -> None:
    """What every index that was taken promises: runs within their shards, apart, and a text that is read the same."""
    again = parse_index(dump_index(index), "again")
    assert dump_index(again) == dump_index(index)
    runs = []
    for scale, plane in index.planes.items():
        for image, length in enumerate(index.run_lengths(scale).tolist()):
            shard, start = int(index.shard[image]), int(plane.offset[image])
            assert 0 <= start < start + length <= index.shards[shard].bytes
            runs.append((shard, start, start + length))
    runs.sort()
    for (shard, _, stop), (following, start, _) in pairwise(runs):
        assert shard < following or stop <= start
    for number in range(len(index.shards)):
        if index.shards[number].bytes < 1 << 40:
            spans(index, number)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def image_seeds() -> list[bytes]:
    picture = Image.fromarray(photograph(40, 56))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    return [
        encoded(picture, "PNG", exif=exif),
        encoded(picture.convert("P"), "PNG"),
        encoded(picture.convert("RGBA"), "PNG"),
        encoded(picture, "JPEG", exif=exif),
        encoded(picture, "JPEG", progressive=True),
        encoded(picture.convert("L"), "JPEG"),
        encoded(picture, "BMP"),
        encoded(picture, "TIFF"),
        *(
            encoded(picture, "TIFF", compression=name)
            for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
        ),
        encoded(picture, "WEBP", lossless=True, exif=exif),
        encoded(picture, "WEBP"),
        encoded(picture, "GIF"),
    ]


def change_png(data: bytes, rng: random.Random) -> bytes:
    """Chunks changed inside, moved, doubled or dropped, each with the checksum that fits what it holds then."""
    at, chunks = 8, []
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += length + 12
    for _ in range(rng.choice([1, 1, 2])):
        k = rng.randrange(len(chunks))
        kind, inner = chunks[k]
        match rng.randrange(5):
            case 0 | 1:
                chunks[k] = (kind, mutated(inner, rng, EDGES))
            case 2:
                chunks.insert(rng.randrange(len(chunks)), chunks[k])
            case 3:
                del chunks[k]
            case _:
                text = (rng.choice([b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"acTL", b"iCCP", b"tRNS"]), rng.randbytes(20))
                chunks.insert(k, text)
        if not chunks:
            break
    body = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks)
    return data[:8] + b"".join(body)


def test_images(capfd: pytest.CaptureFixture[str]) -> None:
    """The image reader: files of every kind."""
    seeds = image_seeds()

    def make(rng: random.Random) -> bytes:
        data = rng.choice(seeds)
        if data.startswith(b"\x89PNG") and rng.random() < 0.7:
            return change_png(data, rng)
        return mutated(data, rng, EDGES)

    def meet(given: bytes) -> str:
        try:
            pixels = decode(given, "file", MAX_PIXELS)
        except ImageError as error:
            return refused(error, "file: expected ")
        assert pixels.dtype == "uint8"
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert 0 < pixels.size <= 3 * MAX_PIXELS
        assert pixels.flags.c_contiguous
        return "taken"

    told = fuzz("images", make, meet, capfd)
    assert told["refused"]
    assert told["taken"]


def test_hdf5_structure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """libhdf5, when `verify --quick` has it open a shard whose metadata is damaged."""
    for i in range(30):
        write_image(tmp_path / f"in/{i}.png", photograph(20, 20, i))
    data = build(tmp_path / "in", tmp_path / "out", images_per_shard=30, tile=16)
    index = read_index(data)
    path = data / index.shards[0].file
    whole = path.read_bytes()
    gaps = [span for span in spans(index, 0) if span.scale == GAP]

    def make(rng: random.Random) -> bytes:
        changed = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            gap = rng.choice(gaps)
            changed[rng.randrange(gap.start, gap.stop)] = rng.choice([0, 255, rng.randrange(256)])
        return bytes(changed)

    def meet(given: bytes) -> str:
        path.write_bytes(given)
        findings = list(check_structure(data, index, 0))
        assert all(finding.text.startswith(str(path)) for finding in findings)
        return "found" if findings else "not seen"

    assert fuzz("HDF5 structure", make, meet, capfd)["found"]
