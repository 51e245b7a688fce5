"""Image files made to exhaust memory or time: refused in one line, never read in full."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from helpers import photograph
from PIL import Image

from prep.images.decode import decode, read_file, read_size
from prep.images.faults import ImageError
from prep.images.header import EXTRA_BYTES, format_of
from prep.images.jpeg import MAX_SCANS, count_scans

RGB = photograph(23, 31)
GB = 1 << 30


def encoded(kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, kind, **options)
    return file.getvalue()


def sparse(path: Path, data: bytes, length: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    os.truncate(path, length)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "nothing"])
def test_sparse_file_is_not_read(tmp_path: Path, kind: str) -> None:
    """20 GB of holes after the start of a valid image, or after nothing."""
    data = b"" if kind == "nothing" else encoded(kind)
    try:
        sparse(tmp_path / "in/a.png", data, 20 * GB)
    except OSError:
        pytest.skip("this file system does not support such a file")
    expected = "expected PNG, JPEG" if kind == "nothing" else f"expected at most {EXTRA_BYTES + 16 * 23 * 31} bytes"
    for read in (read_size, read_file):
        with pytest.raises(ImageError, match=expected):
            read(tmp_path / "in/a.png")


def test_build_with_little_memory(tmp_path: Path) -> None:
    """3 GB of zeros once took 3.2 GB of memory."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/good.png").write_bytes(encoded("PNG"))
    try:
        sparse(tmp_path / "in/zeros.png", b"", 3 * GB)
    except OSError:
        pytest.skip("this file system does not support such a file")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\nfrom prep.cli import main; main()"
    )
    words = ["build-shards", "in", "--scale", "2", "--workers", "1", "--on-error", "skip"]
    run = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path, check=False, timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert run.returncode == 3, run.stderr
    assert "in/zeros.png: expected PNG, JPEG, BMP, TIFF or WebP, got something else" in run.stderr


def pages(count: int, *, loop: bool = False) -> bytes:
    """Return a TIFF with many pages that share their pixels, or with one directory that points to itself."""
    data = bytearray(encoded("TIFF"))
    first = int.from_bytes(data[4:8], "little")
    entries = int.from_bytes(data[first : first + 2], "little")
    directory = data[first : first + 2 + 12 * entries]
    if loop:
        data[first + len(directory) : first + len(directory) + 4] = first.to_bytes(4, "little")
        return bytes(data)
    data[first + len(directory) : first + len(directory) + 4] = len(data).to_bytes(4, "little")
    for number in range(count - 1):
        following = len(data) + len(directory) + 4
        data += directory + (following if number < count - 2 else 0).to_bytes(4, "little")
    return bytes(data)


def test_tiff_with_many_pages() -> None:
    """Pillow counts pages in quadratic time, which 40,000 would show."""
    for data in (pages(2), pages(40_000), pages(1, loop=True)):
        with pytest.raises(ImageError, match="x: expected one image, got 2 or more"):
            decode(data, "x")
    assert decode(encoded("TIFF"), "x").shape == (23, 31, 3)


def test_tiff_with_too_many_tags_or_truncated(tmp_path: Path) -> None:
    data = bytearray(encoded("TIFF"))
    first = int.from_bytes(data[4:8], "little")
    data[first : first + 2] = b"\xff\xff"
    with pytest.raises(ImageError, match="65535 tags"):
        decode(bytes(data), "x")
    for cut in (9, first + 1, first + 30):
        with pytest.raises(ImageError, match="expected a complete image, got a damaged one"):
            decode(encoded("TIFF")[:cut], "x")


def test_jpeg_with_too_many_scans() -> None:
    data = encoded("JPEG", progressive=True)
    assert decode(data, "x").shape == (23, 31, 3)
    scan = data[data.index(b"\xff\xda") : data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)]
    with pytest.raises(ImageError, match=f"expected at most {MAX_SCANS} scans, got "):
        decode(data[:-2] + scan * MAX_SCANS + data[-2:], "x")


def test_data_after_a_jpeg_image_is_ignored() -> None:
    """Previews and films after the image or in its metadata do not count, and cannot hide a truncated image."""
    thumbnail = encoded("JPEG")
    exif = Image.Exif()
    exif[0x010E] = "x"
    data = encoded("JPEG", exif=exif.tobytes() + thumbnail, progressive=True)
    assert count_scans(data) == count_scans(data + b"\xff\xda" * 9) == count_scans(encoded("JPEG", progressive=True))
    assert decode(data + b"\xff\xda more", "x").shape == (23, 31, 3)
    for cut in range(0, len(data), 97):
        with pytest.raises(ValueError, match="ends before"):
            count_scans(data[:cut])


def test_png_with_huge_text_chunks() -> None:
    """Compressed text before the pixels that would fill the memory."""
    data = encoded("PNG")
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26), 9))
    with pytest.raises(ImageError, match="expected a complete image, got a damaged one"):
        decode(data[:33] + text * 3 + data[33:], "x")


def test_unsupported_formats_are_named() -> None:
    for head, kind in (
        (b"GIF89a", "GIF"), (b"\0\0\0\x20ftypavif", "AVIF"), (b"\0\0\0\x18ftypheic", "HEIC"), (b"8BPS\0\1", "PSD"),
        (b"%PDF-1.4", "PDF"), (b"RIFF\0\0\0\0WAVE", None), (b"", None),
    ):  # fmt: skip
        assert format_of(head) == kind
        with pytest.raises(ImageError, match=f"expected PNG, JPEG, BMP, TIFF or WebP, got {kind or 'something else'}"):
            decode(head, "x")


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"}])
def test_webp_size_is_read_from_the_first_bytes(options: dict[str, object]) -> None:
    """In each of the three forms, since Pillow reads such files in full."""
    data = encoded("WEBP", **options)
    with pytest.raises(ImageError, match="expected at most 100 pixels, got 23 × 31"):
        decode(data[:40], "x", 100)
