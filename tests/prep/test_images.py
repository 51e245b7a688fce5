"""Finding, pairing and decoding image files, including odd ones."""

import io
import os
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from helpers import photograph, write_image
from PIL import Image, ImageOps

from loader.errors import ShardsError
from prep.images.decode import decode, read_image, read_size
from prep.images.faults import ImageError
from prep.images.find import find_images
from prep.images.header import ORIENTATION
from prep.images.pair import check_sizes, pair_lr

RGB = photograph(23, 31)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".webp", ".jpg"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    smooth = cv2.GaussianBlur(RGB, (0, 0), 4)
    options: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(smooth).save(file, **options)
    pixels = read_image(file)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert np.abs(pixels.astype(int) - smooth).max() <= (16 if suffix == ".jpg" else 0)
    assert read_size(file) == (23, 31)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_become_rgb(mode: str) -> None:
    image = Image.fromarray(RGB).convert(mode)
    np.testing.assert_array_equal(decode(encoded(image, "PNG"), "x"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(9))
def test_exif_orientation_is_applied(tmp_path: Path, kind: str, orientation: int) -> None:
    image = Image.fromarray(cv2.GaussianBlur(RGB, (0, 0), 4))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    data = encoded(image, kind, exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    found = decode(data, "x")
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 2
    (tmp_path / "x").write_bytes(data)
    assert read_size(tmp_path / "x") == expected.shape[:2]


def chunks(data: bytes) -> list[bytes]:
    """Return the chunks of a PNG file."""
    at, found = 8, []
    while at < len(data):
        stop = at + 12 + int.from_bytes(data[at : at + 4])
        found.append(data[at:stop])
        at = stop
    return found


@pytest.mark.parametrize("last", ["eXIf", "tEXt"])
def test_png_exif_after_pixels(tmp_path: Path, last: str) -> None:
    """EXIF may come before or after the pixels, as may text."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encoded(Image.fromarray(RGB), "PNG", exif=exif)
    parts = {part[4:8]: part for part in chunks(data)}
    text = b"\0\0\0\5tEXta\0b c"
    parts[b"tEXt"] = text + zlib.crc32(text[4:]).to_bytes(4)
    order = [b"IHDR", b"eXIf", b"IDAT", b"tEXt", b"IEND"]
    if last == "eXIf":
        order = [b"IHDR", b"IDAT", b"eXIf", b"IEND"]
    moved = data[:8] + b"".join(parts[kind] for kind in order)
    np.testing.assert_array_equal(decode(moved, "x"), np.rot90(RGB, -1))
    (tmp_path / "x.png").write_bytes(moved)
    assert read_size(tmp_path / "x.png") == (31, 23)


def test_changed_png_chunks_are_refused() -> None:
    """Every byte belongs to a chunk with a checksum, except what follows the last chunk."""
    data = encoded(Image.fromarray(RGB[:9, :9]), "PNG")
    for at in range(8, len(data)):
        with pytest.raises(ImageError, match="^x: expected "):
            decode(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :], "x")
    np.testing.assert_array_equal(decode(data + b"more", "x"), RGB[:9, :9])


def test_read_size_needs_no_pixels(tmp_path: Path) -> None:
    """Only the header is read, so damaged pixels do not matter."""
    for suffix in (".png", ".jpg", ".webp", ".bmp"):
        data = encoded(Image.fromarray(photograph(64, 48)), {"jpg": "JPEG"}.get(suffix[1:], suffix[1:].upper()))
        file = tmp_path / f"a{suffix}"
        half = len(data) // 2
        file.write_bytes(data[:half] + bytes(len(data) - half - 12) + data[-12:])
        assert read_size(file) == (64, 48)
        if suffix == ".png":
            with pytest.raises(ImageError):
                read_image(file)


def test_errors_are_one_line(tmp_path: Path) -> None:
    """Whatever the file name, both in single errors and in lists of files."""
    for folder in ("a", "b\nc"):
        write_image(tmp_path / folder / "x\ty.png", RGB)
    with pytest.raises(ShardsError) as caught:
        find_images([tmp_path])
    assert len(str(caught.value).splitlines()) == 2
    assert r"b\nc/x\ty.png" in str(caught.value)
    with pytest.raises(ImageError, match=r"^a\\nb: expected "):
        decode(b"", "a\nb")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha(mode: str) -> None:
    image = Image.fromarray(RGB).convert(mode)
    np.testing.assert_array_equal(decode(encoded(image, "PNG"), "x"), np.asarray(image.convert("RGB")))
    image.putpixel((3, 4), (1,) * (len(mode) - 1) + (254,))
    with pytest.raises(ImageError, match="x: expected opaque pixels, got transparent ones"):
        decode(encoded(image, "PNG"), "x")


def test_images_that_8_bit_rgb_cannot_represent(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "deep.png"), RGB.astype(np.uint16) * 257)
    cv2.imwrite(str(tmp_path / "deep.tiff"), RGB.astype(np.uint16) * 257)
    for file in tmp_path.iterdir():
        with pytest.raises(ImageError, match=rf"{file.name}: expected 8 bits per channel, got 16"):
            read_image(file)
    for kind in ("JPEG", "TIFF"):
        with pytest.raises(ImageError, match="got CMYK"):
            decode(encoded(Image.fromarray(RGB).convert("CMYK"), kind), "x")
    frames = [Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())]
    for kind in ("PNG", "WEBP", "TIFF"):
        with pytest.raises(ImageError, match="expected one image, got 2"):
            decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:]), "x")
    with pytest.raises(ImageError, match="expected PNG, JPEG, BMP, TIFF or WebP, got GIF"):
        decode(encoded(frames[0], "GIF"), "x")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_truncated_files(kind: str, options: dict[str, Any]) -> None:
    """Truncated at many lengths, and at each of the last 20."""
    data = encoded(Image.fromarray(photograph(64, 64)), kind, **options)
    for part in {*range(0, len(data), len(data) // 50), *range(len(data) - 20, len(data))}:
        with pytest.raises(ImageError, match=r"^x: expected "):
            decode(data[:part], "x")


def test_files_that_are_not_images(tmp_path: Path) -> None:
    for data in (b"", b"hello, this is text\n", bytes(5000), encoded(Image.fromarray(RGB), "PNG")[:8]):
        with pytest.raises(ImageError, match=r"^x: expected "):
            decode(data, "x")
    with pytest.raises(ImageError, match="gone.png: expected a readable file, got No such file"):
        read_image(tmp_path / "gone.png")


def test_too_many_pixels() -> None:
    data = encoded(Image.fromarray(RGB), "PNG")
    assert decode(data, "x", 23 * 31).shape == (23, 31, 3)
    with pytest.raises(ImageError, match="expected at most 712 pixels, got 23 × 31"):
        decode(data, "x", 23 * 31 - 1)


def test_wrong_suffix_does_not_matter() -> None:
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(RGB), "BMP"), "x.png"), RGB)


def test_find_images(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.png", "in/ner/c.png", ".hidden.png", ".git/d.png"):
        write_image(tmp_path / name, RGB)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = find_images([tmp_path])
    assert [(file.stem, file.name) for file in found] == [("a", "a.png"), ("b", "b.PNG"), ("c", "in/ner/c.png")]
    assert [file.name for file in find_images([tmp_path / "in", tmp_path / "a.png"])] == ["a.png", "ner/c.png"]


def test_find_images_errors(tmp_path: Path) -> None:
    with pytest.raises(ShardsError, match="got nothing"):
        find_images([tmp_path / "none"])
    with pytest.raises(ShardsError, match="got none in this folder"):
        find_images([tmp_path])
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ShardsError, match=r"notes.txt: expected an image .* got '.txt'"):
        find_images([tmp_path / "notes.txt"])
    for name in ("a.png", "x/a.jpg", "b.png", "x/b.png", "c.png"):
        write_image(tmp_path / name, RGB)
    with pytest.raises(ShardsError) as caught:
        find_images([tmp_path])
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == ["a", "b"]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.png")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system allows UTF-8 names only")
    with pytest.raises(ShardsError, match=r"(?s)expected file names in UTF-8, got these.*b\\xff.png"):
        find_images([tmp_path])


@pytest.mark.parametrize("layout", ["X4/{}x4.png", "{}x4.png"])
def test_pair_lr(tmp_path: Path, layout: str) -> None:
    for name in ("a", "b", "c"):
        write_image(tmp_path / "hr" / f"{name}.png", RGB)
        write_image(tmp_path / "lr" / layout.format(name), RGB[::4, ::4][:5, :7])
        write_image(tmp_path / "lr" / layout.replace("4", "2").format(name), RGB[::2, ::2])
    hr = find_images([tmp_path / "hr"])
    lr = pair_lr(hr, tmp_path / "lr", 4)
    assert [file.stem for file in lr] == ["ax4", "bx4", "cx4"]
    check_sizes(hr, lr, 4)

    write_image(tmp_path / "hr" / "d.png", RGB)
    write_image(tmp_path / "lr" / layout.format("e"), RGB)
    write_image(tmp_path / "lr" / layout.format("f"), RGB)
    with pytest.raises(ShardsError) as caught:
        pair_lr(find_images([tmp_path / "hr"]), tmp_path / "lr", 4)
    mismatches = str(caught.value).splitlines()[1:]
    assert len(mismatches) == 3
    for line, part in zip(mismatches, ["d.png: no LR image dx4", "ex4.png: no HR", "fx4.png: no HR"], strict=True):
        assert part in line


def test_mismatched_sizes(tmp_path: Path) -> None:
    sizes = {"down": (5, 7), "up": (6, 8), "short": (4, 7), "turned": (7, 5)}  # 23 / 4 = 5.75, 31 / 4 = 7.75
    for name, (height, width) in sizes.items():
        write_image(tmp_path / "hr" / f"{name}.png", RGB)
        write_image(tmp_path / "lr" / f"{name}x4.png", RGB[:height, :width])
    hr = find_images([tmp_path / "hr"])
    with pytest.raises(ShardsError) as caught:
        check_sizes(hr, pair_lr(hr, tmp_path / "lr", 4), 4)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 2
    assert "shortx4.png: expected 5 × 7 for HR of 23 × 31, got 4 × 7" in lines[0]
    assert "turnedx4.png: expected 5 × 7 for HR of 23 × 31, got 7 × 5" in lines[1]
