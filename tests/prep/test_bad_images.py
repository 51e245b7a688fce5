"""Odd and bad image files: `prep` packs the good ones and reports each bad one in a line."""

import errno
import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from helpers import photograph, write_image
from PIL import Image

from loader.format.index import read_index
from loader.pixels.shards import Shards
from prep.cli import main
from prep.images.decode import decode
from prep.shard import planes as planes_module

RGB = photograph(23, 31)
PICTURE = Image.fromarray(RGB)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def header(height: int, width: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


def resized_jpeg(height: int, width: int) -> bytes:
    data = bytearray(encoded(PICTURE, "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def deep() -> bytes:
    done, data = cv2.imencode(".png", RGB.astype(np.uint16) * 257)
    assert done
    return bytes(data)


def translucent() -> Image.Image:
    image = PICTURE.convert("RGBA")
    image.putpixel((3, 4), (1, 2, 3, 254))
    return image


def truncated(data: bytes, at: float) -> bytes:
    return data[: int(len(data) * at)]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


PNG, JPEG = encoded(PICTURE, "PNG"), encoded(PICTURE, "JPEG", quality=95)
FRAMES = {"save_all": True, "append_images": [Image.fromarray(RGB[::-1].copy())]}
BAD: dict[str, tuple[bytes, str]] = {
    "empty.png": (b"", "expected PNG, JPEG, BMP, TIFF or WebP, got something else, or a damaged header"),
    "zeros.png": (bytes(4000), "expected PNG, JPEG, BMP, TIFF or WebP, got something else"),
    "text.png": (b"not an image\n" * 9, "expected PNG, JPEG, BMP, TIFF or WebP, got something else"),
    "program.jpg": (b"\x7fELF" + bytes(200), "expected PNG, JPEG, BMP, TIFF or WebP, got something else"),
    "page.png": (b"<!DOCTYPE html><html><body>404</body></html>", "expected PNG, JPEG, BMP, TIFF or WebP"),
    "gif.png": (encoded(PICTURE, "GIF"), "expected PNG, JPEG, BMP, TIFF or WebP, got GIF"),
    **{f"truncated{p}.png": (truncated(PNG, p / 100), "expected ") for p in (1, 5, 30, 60, 90, 99)},
    **{f"truncated{p}.jpg": (truncated(JPEG, p / 100), "expected ") for p in (1, 5, 30, 60, 90, 99)},
    "flipped.png": (flipped(PNG, len(PNG) // 2), "expected a complete image, got a damaged one"),
    "no end.png": (PNG[:-12], "expected a complete image, got a damaged one"),
    "too few pixels.png": (
        png(header(8, 8), (b"IDAT", zlib.compress(bytes(25))), (b"IEND", b"")), "expected a complete image of 8 × 8",
    ),
    "deep.png": (deep(), "expected 8 bits per channel, got 16"),
    "cmyk.jpg": (encoded(PICTURE.convert("CMYK"), "JPEG"), "got CMYK"),
    "translucent.png": (encoded(translucent(), "PNG"), "expected opaque pixels, got transparent ones"),
    "animated.png": (encoded(PICTURE, "PNG", **FRAMES), "expected one image, got 2"),
    "animated.webp": (encoded(PICTURE, "WEBP", **FRAMES), "expected one image, got 2"),
    "pages.tiff": (encoded(PICTURE, "TIFF", **FRAMES), "expected one image, got 2"),
    "bomb.png": (
        png(header(100_000, 100_000), (b"IDAT", zlib.compress(bytes(1 << 20))), (b"IEND", b"")),
        "expected at most 268435456 pixels, got 100000 × 100000",
    ),
    "bomb.jpg": (resized_jpeg(65_500, 65_500), "expected at most 268435456 pixels, got 65500 × 65500"),
    "no pixels.png": (png(header(0, 0), (b"IDAT", b""), (b"IEND", b"")), "expected "),
    "1 × 1.png": (encoded(PICTURE.crop((0, 0, 1, 1)), "PNG"), "expected at least 2 × 2 pixels, got 1 × 1"),
    "narrow.png": (encoded(PICTURE.crop((0, 0, 1, 23)), "PNG"), "expected at least 2 × 2 pixels, got 23 × 1"),
    "new\nline and \x1b[31mcolour.png": (b"", "expected PNG"),
}  # fmt: skip
TURNED = Image.Exif()
TURNED[0x0112] = 6
GOOD: dict[str, tuple[bytes, tuple[int, int]]] = {
    "grey.png": (encoded(PICTURE.convert("L"), "PNG"), (23, 31)),
    "bits.png": (encoded(PICTURE.convert("1"), "PNG"), (23, 31)),
    "palette.png": (encoded(PICTURE.convert("P"), "PNG"), (23, 31)),
    "opaque.png": (encoded(PICTURE.convert("RGBA"), "PNG"), (23, 31)),
    "interlaced.jpg": (encoded(PICTURE, "JPEG", progressive=True), (23, 31)),
    "turned.jpg": (encoded(PICTURE, "JPEG", exif=TURNED), (31, 23)),
    "turned.png.png": (encoded(PICTURE, "PNG", exif=TURNED), (31, 23)),
    "really a bmp.png": (encoded(PICTURE, "BMP"), (23, 31)),
    "really a jpeg.png": (JPEG, (23, 31)),
    "two wide.png": (encoded(PICTURE.crop((0, 0, 2, 23)), "PNG"), (23, 2)),
    " spaces  and\ttabs .png": (PNG, (23, 31)),
    "a\nnew line.png": (PNG, (23, 31)),
    "quotes '\" and \\ $(x) ; % {}.png": (PNG, (23, 31)),
    "-dash.png": (PNG, (23, 31)),
    "日本 ü é.PNG": (PNG, (23, 31)),
}


def prep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process, so that output of libraries is captured, too."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-m", "prep.cli", *arguments],
        capture_output=True, text=True, env=environment, cwd=folder, check=False,
    )  # fmt: skip


def fill(folder: Path, files: dict[str, tuple[bytes, Any]]) -> Path:
    folder.mkdir()
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return folder


def lines_about(text: str, name: str) -> list[str]:
    """Return the lines about a file, whose name may contain escapes."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    return [line for line in text.splitlines() if f"{shown}: " in line]


def unique_stems(files: dict[str, tuple[bytes, Any]]) -> dict[str, tuple[bytes, Any]]:
    """Return the files with a number before each name, since stems name the images."""
    return {f"{i} {name}": value for i, (name, value) in enumerate(files.items())}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_each_bad_file_is_reported_in_one_line(tmp_path: Path, workers: str) -> None:
    bad = unique_stems(BAD)
    fill(tmp_path / "in", bad | {"good.png": (PNG, None)})
    run = prep(tmp_path, "build-shards", "in", "--scale", "2", "--workers", workers, "--on-error", "skip")
    assert run.returncode == 3, run.stderr
    assert "Traceback" not in run.stderr
    assert list(read_index(tmp_path / "shards/in").name) == ["good"]
    for name, (_, message) in bad.items():
        lines = lines_about(run.stderr, name)
        assert len(lines) == 1, (name, lines)
        assert message in lines[0], lines[0]
    others = [line for line in run.stderr.splitlines() if ": expected " not in line and " images, " not in line]
    # libpng itself may complain about missing pixels, although all chunks are intact, without naming the file.
    others = [line for line in others if line != "libpng error: Not enough image data"]
    assert len(others) == 1, others  # the heading
    assert others[0].startswith(f"skipped {len(bad)} images")


@pytest.mark.parametrize("name", BAD)
def test_bad_file_fails_the_build(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 1, no dataset. In this process, since there are many."""
    fill(tmp_path / "in", {name: BAD[name], "zz good.png": (PNG, None)})
    with pytest.raises(SystemExit) as caught:
        main(["build-shards", str(tmp_path / "in"), "--scale", "2", "--workers", "1", "--out", str(tmp_path / "out")])
    assert caught.value.code == 1
    text = capfd.readouterr().err
    assert len(lines_about(text, name)) == 1, text
    assert BAD[name][1] in text
    assert not list(tmp_path.glob("out/index.json"))
    assert not list(tmp_path.glob("out/*.part"))


def test_odd_but_valid_files(tmp_path: Path) -> None:
    fill(tmp_path / "in", GOOD)
    run = prep(tmp_path, "build-shards", "in", "--scale", "2", "--workers", "2", "--images-per-shard", "4")
    assert run.returncode == 0, run.stderr
    shards = Shards(tmp_path / "shards/in")
    names = list(shards.index.name)
    assert sorted(names) == sorted(Path(name).stem for name in GOOD)
    for name, (data, size) in GOOD.items():
        pixels = shards.read(names.index(Path(name).stem), 1)
        assert pixels.shape[:2] == size
        np.testing.assert_array_equal(pixels, decode(data, name))
    run = prep(tmp_path, "verify", "shards/in", "--source", "in")
    assert run.returncode == 0, run.stdout
    assert run.stdout.count("\n") == 1
    (tmp_path / "in/a\nnew line.png").write_bytes(JPEG)
    run = prep(tmp_path, "verify", "shards/in", "--source", "in")
    assert run.returncode == 1
    assert run.stdout.count("\n") == 2
    assert "a\\nnew line.png: changed since the build" in run.stdout


def broken_link(folder: Path) -> tuple[str, str]:
    (folder / "broken.png").symlink_to("nothing.png")
    return "broken.png", os.strerror(errno.ENOENT)


def loop(folder: Path) -> tuple[str, str]:
    (folder / "loop.png").symlink_to("loop.png")
    return "loop.png", os.strerror(errno.ELOOP)


def unreadable(folder: Path) -> tuple[str, str]:
    write_image(folder / "unreadable.png", RGB)
    (folder / "unreadable.png").chmod(0)
    if os.access(folder / "unreadable.png", os.R_OK):
        pytest.skip("this user can read everything")
    return "unreadable.png", os.strerror(errno.EACCES)


@pytest.mark.parametrize("make", [broken_link, loop, unreadable])
def test_unreadable_files(tmp_path: Path, make: Callable[[Path], tuple[str, str]]) -> None:
    fill(tmp_path / "in", {"good.png": (PNG, None)})
    name, reason = make(tmp_path / "in")
    run = prep(tmp_path, "build-shards", "in", "--scale", "2")
    assert run.returncode == 1
    assert len(lines_about(run.stderr, name)) == 1
    assert f"expected a readable file, got {reason}" in run.stderr
    assert not (tmp_path / "shards/in/index.json").exists()
    run = prep(tmp_path, "build-shards", "in", "--scale", "2", "--on-error", "skip")
    assert run.returncode == 3
    assert list(read_index(tmp_path / "shards/in").name) == ["good"]


def test_folders_and_pipes_with_image_names(tmp_path: Path) -> None:
    """A folder that contains itself, and folders and pipes named like images: nothing blocks."""
    fill(tmp_path / "in", {"good.png": (PNG, None)})
    os.mkfifo(tmp_path / "in/pipe.png")
    (tmp_path / "in/to a pipe.png").symlink_to("pipe.png")
    (tmp_path / "in/again").symlink_to(".")
    (tmp_path / "in/folder.png").mkdir()
    run = prep(tmp_path, "build-shards", "in", "--scale", "2")
    assert run.returncode == 0, run.stderr
    assert list(read_index(tmp_path / "shards/in").name) == ["good"]


def test_refused_names(tmp_path: Path) -> None:
    """Invalid UTF-8 or duplicate stems: reported before anything is built."""
    fill(tmp_path / "in", {"a.png": (PNG, None), "a.jpg": (JPEG, None)})
    run = prep(tmp_path, "build-shards", "in", "--scale", "2")
    assert run.returncode == 1
    assert "a: in/a.jpg, in/a.png" in run.stderr or "a: in/a.png, in/a.jpg" in run.stderr
    (tmp_path / "in/a.jpg").unlink()
    try:
        Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/b\xff.png")).write_bytes(PNG)
    except OSError:
        pytest.skip("this file system allows UTF-8 names only")
    run = prep(tmp_path, "build-shards", "in", "--scale", "2")
    assert run.returncode == 1
    assert run.stderr.count("\n") == 2
    assert "expected file names in UTF-8, got these" in run.stderr
    assert r"in/b\xff.png" in run.stderr
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("change", ["vanish", "truncate", "another image"])
def test_file_that_changes_during_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    """After the first image is read, the second is replaced."""
    fill(tmp_path / "in", {"a.png": (PNG, None), "b.png": (PNG, None)})
    second = tmp_path / "in/b.png"
    other = encoded(Image.fromarray(RGB[:20]), "PNG")

    def decode_and_change(data: bytes, *rest: Any) -> Any:
        if change == "vanish":
            second.unlink(missing_ok=True)
        else:
            second.write_bytes(PNG[:100] if change == "truncate" else other)
        return decode(data, *rest)

    monkeypatch.setattr(planes_module, "decode", decode_and_change)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as caught:
        main(["build-shards", str(tmp_path / "in"), "--scale", "2", "--workers", "1", "--out", str(out)])
    text = capsys.readouterr().err
    if change == "another image":
        # What was read is what was packed, and its digest is recorded.
        assert caught.value.code == 0
        assert read_index(out).height.tolist() == [23, 20]
        monkeypatch.undo()
        with pytest.raises(SystemExit) as caught:
            main(["verify", str(out), "--source", str(tmp_path / "in")])
        assert caught.value.code == 0
    else:
        assert caught.value.code == 1
        assert len(lines_about(text, "b.png")) == 1
        assert not (out / "index.json").exists()
