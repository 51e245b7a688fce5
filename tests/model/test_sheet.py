"""Sheets: choice of the crop, position of its pixels, atomic writes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import photograph

from loader.resize.imresize import enlarge, imresize
from model.evaluate import sheet
from model.evaluate.sheet import GAP, LINE, MARGIN, PANEL, Row, draw_sheet, make_row, write_sheet
from model.metrics import Image, luma, psnr, score


def row(height: int, width: int, scale: int = 4, name: str = "a", side: int = 96) -> tuple[Row, Image, Image]:
    """Return a row, the network's image and HR; bicubic is worst in the detailed lower right corner."""
    hr = cv2.GaussianBlur(photograph(height, width), (0, 0), 3).astype(np.uint8)
    rng = np.random.default_rng(0)
    hr[height // 2 :, width // 2 :] = rng.integers(0, 256, hr[height // 2 :, width // 2 :].shape)
    lr = imresize(hr, scale)
    bicubic = enlarge(lr, scale)
    sr = cv2.addWeighted(hr, 0.5, bicubic, 0.5, 0).astype(np.uint8)
    return make_row(name, lr, sr, bicubic, hr, scale, side), sr, hr


def test_crop_is_where_network_and_bicubic_differ_most() -> None:
    made, sr, hr = row(240, 320, side=64)
    network, truth = made.panels[2].picture, made.panels[3].picture
    top, left = np.argwhere(
        (np.lib.stride_tricks.sliding_window_view(hr[..., 0], (64, 64)) == truth[..., 0]).all((2, 3))
    )[0]
    assert top >= 116
    assert left >= 156
    assert np.array_equal(network, sr[top : top + 64, left : left + 64])
    assert f"from ({left}, {top})" in made.note
    assert made.panels[3].picture.shape == (64, 64, 3)


def test_lr_crop_shows_the_same_region() -> None:
    made, _, hr = row(240, 320, side=50)
    lr = imresize(hr, 4)
    left, top = (int(number) for number in made.note.split("(")[1].rstrip(")").split(", "))
    assert top % 4 == left % 4 == 0
    nearest = lr.repeat(4, 0).repeat(4, 1)
    assert np.array_equal(made.panels[0].picture, nearest[top : top + 50, left : left + 50])


def test_captions_show_the_scores() -> None:
    made, sr, hr = row(120, 160)
    whole = score(sr, hr, 4)
    bicubic = score(enlarge(imresize(hr, 4), 4), hr, 4)
    crop = psnr(luma(made.panels[2].picture), luma(made.panels[3].picture))
    assert made.panels[2].caption == (
        "network",
        f"PSNR-Y {whole.psnr_y:.2f} dB ({whole.psnr_y - bicubic.psnr_y:+.2f})",
        f"SSIM-Y {whole.ssim_y:.4f}",
        f"crop: PSNR-Y {crop:.2f} dB",
    )
    assert [panel.caption[0] for panel in made.panels] == ["LR", "bicubic", "network", "HR"]
    assert made.panels[1].caption[1] == f"PSNR-Y {bicubic.psnr_y:.2f} dB"


def test_equal_images_show_no_gain() -> None:
    hr = photograph(40, 40)
    lr = imresize(hr, 2)
    made = make_row("same", lr, hr, hr, hr, 2, side=16)
    assert "from (0, 0)" in made.note
    assert made.panels[2].caption[1] == "PSNR-Y inf dB"


@pytest.mark.parametrize("size", [(40, 72), (200, 16), (4, 4)])
def test_small_images_are_shown_whole(size: tuple[int, int]) -> None:
    made, _, _ = row(*size)
    height, width = (min(96, side) for side in size)
    assert made.panels[3].picture.shape == (height, width, 3)
    assert draw_sheet([made]).shape[1] == 2 * MARGIN + 4 * PANEL + 3 * GAP


def test_wrong_sizes_are_rejected() -> None:
    hr = photograph(40, 40)
    lr = imresize(hr, 2)
    for images, what in (
        ((lr, hr[:38], hr, hr), "sr"),
        ((lr, hr, hr[:, :30], hr), "bicubic"),
        ((lr, hr, hr, lr), "hr"),
    ):
        with pytest.raises(ValueError, match=rf"x: {what}: expected uint8 \(40, 40, 3\)"):
            make_row("x", *images, 2)
    with pytest.raises(ValueError, match="side must be"):
        make_row("x", lr, hr, hr, hr, 2, side=0)
    with pytest.raises(ValueError, match="at least one row"):
        draw_sheet([])


def test_file_shows_the_crops_in_columns(tmp_path: Path) -> None:
    rows = [row(240, 320)[0], row(48, 100, name="b")[0]]
    write_sheet(rows, tmp_path / "sheet.png")
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    decoded = cv2.imread(str(tmp_path / "sheet.png"))
    assert decoded is not None
    drawn = decoded[..., ::-1]
    top = MARGIN + LINE + 10
    for column, panel in enumerate(rows[0].panels):
        left = MARGIN + column * (PANEL + GAP)
        place = drawn[top : top + PANEL, left : left + PANEL]
        assert np.array_equal(place, panel.picture.repeat(3, 0).repeat(3, 1))
        below = drawn[top + PANEL + 8 : top + PANEL + 8 + LINE, left : left + PANEL]
        assert below.min() < 100  # the caption
    assert (drawn[:, :MARGIN] == 255).all()
    assert (drawn[:, -MARGIN:] == 255).all()
    assert (drawn[-MARGIN:] == 255).all()
    write_sheet(rows, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "sheet.png").read_bytes()


@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize("name", ["a" * 300, "Vögel 写真 " * 30, "\n\x00", "%s{}", "\udce9"])
def test_any_name_fits_its_row(name: str, unicode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if unicode and not sheet.UNICODE:
        pytest.skip("this version of OpenCV draws ASCII only")
    monkeypatch.setattr(sheet, "UNICODE", unicode)
    drawn = draw_sheet([row(48, 100, name=name)[0]])
    assert (drawn[:, :MARGIN] == 255).all()
    assert (drawn[:, -MARGIN:] == 255).all()
    note = sheet.text_width("x4, crop of 96 x 48 from (0, 0)", sheet.FONT, sheet.TEXT)
    head = drawn[MARGIN : MARGIN + LINE]
    assert head[:, : -MARGIN - note].min() < 100
    assert (head[:, -MARGIN - note - GAP : -MARGIN - note - 4] == 255).all()  # the gap between name and note


def test_names_become_ascii_for_old_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheet, "UNICODE", False)
    assert sheet.to_drawable("Vögel am Fluß 写") == "Vogel am Flu? ?"


def test_failed_write_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        write_sheet([row(48, 48)[0]], tmp_path / "folder.png")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sheet([row(48, 48)[0]], tmp_path / "sheet.png")
    before = (tmp_path / "sheet.png").read_bytes()

    def fill(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(OSError, match=r"No space left on device: .*sheet\.png"):
        write_sheet([row(60, 60)[0]], tmp_path / "sheet.png")
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    assert (tmp_path / "sheet.png").read_bytes() == before
