"""OpenCV from 4.10 on: where its log is made silent differs, and what it does about files that are cut."""

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import cv2
import pytest
from helpers import ROOT

from prep.images import header


def old(levels: list[int]) -> SimpleNamespace:
    """OpenCV 4.10: setLogLevel is at the top, and cv2.utils has no logging."""
    return SimpleNamespace(setLogLevel=levels.append, utils=ModuleType("cv2.utils"))


def new(levels: list[int]) -> SimpleNamespace:
    return SimpleNamespace(utils=SimpleNamespace(logging=SimpleNamespace(setLogLevel=levels.append)))


@pytest.mark.parametrize("make", [old, new])
def test_silence_is_found_where_it_is(monkeypatch: pytest.MonkeyPatch, make: object) -> None:
    levels: list[int] = []
    assert callable(make)
    monkeypatch.setattr(header, "cv2", make(levels))
    header.quieten.__wrapped__()
    assert levels == [0]
    monkeypatch.setattr(header, "cv2", SimpleNamespace())  # no way at all: it may be loud
    header.quieten.__wrapped__()


def test_importing_changes_no_setting_of_the_process() -> None:
    """Only reading an image does."""
    code = (
        "import warnings, cv2, PIL.Image\n"
        "level = lambda: cv2.utils.logging.getLogLevel() if hasattr(cv2.utils, 'logging') else None\n"
        "before = level(), PIL.Image.MAX_IMAGE_PIXELS, list(warnings.filters)\n"
        "import prep.images.decode, prep.shard.shard\n"
        "assert before == (level(), PIL.Image.MAX_IMAGE_PIXELS, list(warnings.filters))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


def test_a_cut_jpeg_is_refused_whatever_opencv_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV 4.10 makes up the pixels that are missing."""
    import numpy as np

    from prep.images.decode import decode
    from prep.images.faults import ImageError

    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    data = cv2.imencode(".jpg", image)[1].tobytes()
    whole = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    monkeypatch.setattr("cv2.imdecode", lambda *_: whole)
    assert decode(data, "x").shape == (40, 50, 3)
    for cut in (len(data) // 2, len(data) - 2, len(data) - 1):
        with pytest.raises(ImageError, match="expected a whole image, got a damaged one"):
            decode(data[:cut], "x")
