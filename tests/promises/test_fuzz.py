"""Structure-aware fuzzing: readers may refuse mutated inputs, but only with their own errors.

Each test runs for a few seconds here, and for minutes under `make fuzz`, with a seed of its own. Input n of a seed is
always the same.
"""

import hashlib
import io
import json
import random
import struct
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fuzzing import EDGES, change_json, fuzz, mutated, refused
from helpers import build, photograph, write_image
from PIL import Image

from loader.errors import FormatError
from loader.format.index import read_index
from loader.format.index_text import dump_index, parse_index
from loader.format.layout import Index
from prep.images.decode import decode
from prep.images.faults import ImageError
from prep.shard.checksums import GAP, segments
from prep.shard.hdf5 import check_hdf5

MAX_PIXELS = 1 << 20  # per image, so that headers cannot claim more memory
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")


def signed(body: bytes) -> bytes:
    return body + f'"sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def test_index(dataset: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The index parser: JSON with other values and text with other bytes, mostly with a matching digest."""
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

    def attempt(given: bytes) -> str:
        try:
            index = parse_index(given, "index.json")
        except FormatError as error:
            return refused(error, "index.json")
        check_index(index)
        return "accepted"

    outcomes = fuzz(f"index ({dataset.name})", make, attempt, capfd)
    assert outcomes["refused"]


def check_index(index: Index) -> None:
    """Check an accepted index: runs lie within shards and do not overlap, and its text parses to the same index."""
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
            segments(index, number)


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
    """Change, move, duplicate or drop chunks, each with a matching checksum."""
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
    """The image reader: files of every format."""
    seeds = image_seeds()

    def make(rng: random.Random) -> bytes:
        data = rng.choice(seeds)
        if data.startswith(b"\x89PNG") and rng.random() < 0.7:
            return change_png(data, rng)
        return mutated(data, rng, EDGES)

    def attempt(given: bytes) -> str:
        try:
            pixels = decode(given, "file", MAX_PIXELS)
        except ImageError as error:
            return refused(error, "file: expected ")
        assert pixels.dtype == "uint8"
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert 0 < pixels.size <= 3 * MAX_PIXELS
        assert pixels.flags.c_contiguous
        return "accepted"

    outcomes = fuzz("images", make, attempt, capfd)
    assert outcomes["refused"]
    assert outcomes["accepted"]


def test_hdf5_structure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """libhdf5, when `verify --quick` opens a shard with damaged metadata."""
    for i in range(30):
        write_image(tmp_path / f"in/{i}.png", photograph(20, 20, i))
    data = build(tmp_path / "in", tmp_path / "out", images_per_shard=30, tile=16)
    index = read_index(data)
    path = data / index.shards[0].file
    whole = path.read_bytes()
    gaps = [segment for segment in segments(index, 0) if segment.level == GAP]

    def make(rng: random.Random) -> bytes:
        changed = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            gap = rng.choice(gaps)
            changed[rng.randrange(gap.start, gap.stop)] = rng.choice([0, 255, rng.randrange(256)])
        return bytes(changed)

    def attempt(given: bytes) -> str:
        path.write_bytes(given)
        findings = list(check_hdf5(data, index, 0))
        assert all(finding.text.startswith(str(path)) for finding in findings)
        return "found" if findings else "not found"

    assert fuzz("HDF5 structure", make, attempt, capfd)["found"]
