"""Pillow and OpenCV: only commands change their settings; OpenCV 4.10 and later all work."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cv2
import pytest
import torch
from helpers import ROOT, photograph
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from model.enlarge.pictures import read_picture
from model.shufflemixer import ShuffleMixer
from prep.images import decoders
from prep.images.decode import read_image


def old(levels: list[int]) -> SimpleNamespace:
    """Return OpenCV 4.10's layout: setLogLevel at the top, and no cv2.utils.logging."""
    return SimpleNamespace(setLogLevel=levels.append, utils=ModuleType("cv2.utils"))


def new(levels: list[int]) -> SimpleNamespace:
    return SimpleNamespace(utils=SimpleNamespace(logging=SimpleNamespace(setLogLevel=levels.append)))


@pytest.mark.parametrize("make", [old, new])
def test_every_opencv_version_is_silenced(monkeypatch: pytest.MonkeyPatch, make: object) -> None:
    levels: list[int] = []
    assert callable(make)
    monkeypatch.setattr(decoders, "cv2", make(levels))
    decoders.configure_decoders()
    assert levels == [0]
    monkeypatch.setattr(decoders, "cv2", SimpleNamespace())  # no setLogLevel at all
    decoders.configure_decoders()


SETTINGS = """
import warnings, sys, cv2, PIL.Image
from pathlib import Path
def settings():
    level = cv2.utils.logging.getLogLevel() if hasattr(cv2.utils, "logging") else None
    return level, PIL.Image.MAX_IMAGE_PIXELS, [each for each in warnings.filters if "PIL" in str(each)]
before = settings()
"""


def test_importing_and_reading_change_no_settings(folder: Path) -> None:
    """A program that imports this project owns its process; only our commands configure the decoders."""
    code = SETTINGS + (
        "import train, model.evaluate.evaluate, model.enlarge.upscale, model.export, model.curves\n"
        "import loader, prep.cli, prep.build.build, prep.verify.verify\n"
        "assert settings() == before, settings()\n"
        "from model.evaluate.pairs import read_pairs\n"
        "assert len(list(read_pairs(Path(sys.argv[1]), None, 2))) == 5\n"
        "assert settings() == before, settings()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, check=True, timeout=300)


@pytest.fixture(scope="module")
def odd_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two valid images: Pillow warns about the EXIF data of one, OpenCV about an unknown tag in the other."""
    folder = tmp_path_factory.mktemp("odd")
    image = Image.fromarray(photograph(64, 72))
    image.save(folder / "exif.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\0\0\0\0")
    tags = ImageFileDirectory_v2()
    tags[65000] = "private"
    image.save(folder / "tag.tif", tiffinfo=tags)
    return folder


def run_silently(*words: object) -> None:
    """Run a Python program and check that it prints nothing on standard error."""
    command = [sys.executable, "-W", "default", *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=300)
    assert (run.returncode, run.stderr) == (0, "")


def test_unconfigured_decoders_print(odd_images: Path) -> None:
    """The tests below can fail."""
    code = "import sys; from pathlib import Path; from model.evaluate.pairs import read_pairs\n"
    code += "list(read_pairs(Path(sys.argv[1]), None, 2))"
    command = [sys.executable, "-W", "default", "-c", code, str(odd_images)]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=300).stderr
    assert "Corrupt EXIF data" in printed
    assert "65000" in printed or not hasattr(cv2.utils, "logging")


def test_pillows_size_limit_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where no command has lifted it."""
    transparent = Image.fromarray(photograph(64, 72)).convert("RGBA")
    transparent.putpixel((3, 4), (1, 2, 3, 4))
    transparent.save(tmp_path / "a.png")
    Image.fromarray(photograph(64, 72)).save(tmp_path / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_picture(tmp_path / "a.png").rgb.shape == (64, 72, 3)
    assert read_image(tmp_path / "b.png").shape == (64, 72, 3)


def test_builds_and_verify_print_no_decoder_messages(odd_images: Path, tmp_path: Path) -> None:
    build = ["build-shards", odd_images, "--scale", 2, "--out", tmp_path / "out", "--images-per-shard", 1]
    run_silently("-m", "prep.cli", *build, "--workers", 2)
    run_silently("-m", "prep.cli", "verify", tmp_path / "out", "--source", odd_images)


def test_model_commands_print_no_decoder_messages(odd_images: Path, tmp_path: Path) -> None:
    network = ShuffleMixer(8, 3, 1, 2, 2)
    torch.save({"params": network.state_dict()}, tmp_path / "weights.pt")
    run_silently("-m", "model.evaluate", "--hr", odd_images, "--bicubic", "--scale", 2)
    flags = ["--checkpoint", tmp_path / "weights.pt", "--out", tmp_path / "large"]
    run_silently("-m", "model.upscale", odd_images, *flags)


def test_truncated_jpeg_is_refused_even_if_opencv_decodes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV 4.10 makes up the missing pixels."""
    import numpy as np

    from prep.images.decode import decode
    from prep.images.faults import ImageError

    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    data = cv2.imencode(".jpg", image)[1].tobytes()
    whole = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    monkeypatch.setattr("cv2.imdecode", lambda *_: whole)
    assert decode(data, "x").shape == (40, 50, 3)
    for cut in (len(data) // 2, len(data) - 2, len(data) - 1):
        with pytest.raises(ImageError, match="expected a complete image, got a damaged one"):
            decode(data[:cut], "x")
