"""Sheets: a PNG that compares a network with bicubic and HR.

Each image is a row of four crops of one region: LR (nearest neighbour), bicubic, the network, HR. The region is where
the network and bicubic differ most. Images are uint8 arrays (H, W, 3), RGB.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from loader.errors import ShardsError, one_line
from loader.system.safefile import write_atomically
from model.metrics import Image, Scores, luma, psnr, score

PANEL = 288  # pixels: the longer side of an enlarged crop, or slightly less, since factors are integers
MARGIN, GAP = 24, 16
LINE = 22  # pixels between lines of text
FONT, BOLD = cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX
HEADING, TEXT = 0.62, 0.5  # font scales
INK, PALE, PAPER = (32, 32, 32), (112, 112, 112), (255, 255, 255)
UNICODE = int(cv2.__version__.split(".")[0]) >= 5  # earlier versions of OpenCV draw ASCII only


@dataclass(frozen=True)
class Panel:
    """A crop and the lines below it, of which the first is its title."""

    picture: Image
    caption: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A row of the sheet: the image's name, a note about the crop, and the panels from left to right."""

    name: str
    note: str
    panels: tuple[Panel, ...]


def make_row(name: str, lr: Image, sr: Image, bicubic: Image, hr: Image, scale: int, side: int = 96) -> Row:
    """Crop all images where `sr` and `bicubic` differ most, and score `sr` and `bicubic`.

    Args:
        name: the image's name.
        lr: (H, W, 3).
        sr: the network's result, (H·scale, W·scale, 3), as `bicubic` and `hr`.
        bicubic: the result of bicubic enlargement.
        hr: the reference.
        scale: also the border, in pixels, excluded from the scores of the whole image.
        side: of the crop, in HR pixels; smaller images are shown whole.

    Raises:
        ValueError: a dtype or shape is wrong.
    """
    expected = (lr.shape[0] * scale, lr.shape[1] * scale, 3)
    for what, image in (("sr", sr), ("bicubic", bicubic), ("hr", hr)):
        if image.shape != expected or image.dtype != np.uint8:
            raise ValueError(f"{name}: {what}: expected uint8 {expected}, got {image.dtype} {image.shape}")
    if side < 1:
        raise ValueError(f"side must be at least 1 pixel, got {side}")
    top, left = most_different_crop(sr, bicubic, scale, side)
    region = np.s_[top : top + side, left : left + side]
    height, width = hr[region].shape[:2]
    # Top and left are multiples of the scale, so the region starts at an LR pixel.
    block = lr[top // scale :, left // scale :][: -(-height // scale), : -(-width // scale)]
    nearest = block.repeat(scale, axis=0).repeat(scale, axis=1)[:height, :width]
    panels = [Panel(nearest, ("LR", f"{lr.shape[1]} x {lr.shape[0]} pixels"))]
    baseline = score_whole(bicubic, hr, scale)
    for what, image in (("bicubic", bicubic), ("network", sr)):
        whole = score_whole(image, hr, scale)
        gain = whole.psnr_y - baseline.psnr_y
        lines = (
            f"PSNR-Y {whole.psnr_y:.2f} dB" + (f" ({gain:+.2f})" if image is sr and math.isfinite(gain) else ""),
            "image too small for SSIM" if math.isnan(whole.ssim_y) else f"SSIM-Y {whole.ssim_y:.4f}",
            f"crop: PSNR-Y {psnr(luma(image[region]), luma(hr[region])):.2f} dB",
        )
        panels.append(Panel(np.ascontiguousarray(image[region]), (what, *lines)))
    panels.append(Panel(np.ascontiguousarray(hr[region]), ("HR", f"{hr.shape[1]} x {hr.shape[0]} pixels")))
    note = f"x{scale}, crop of {width} x {height} from ({left}, {top})"
    return Row(name, note, tuple(panels))


def most_different_crop(first: Image, second: Image, step: int, side: int) -> tuple[int, int]:
    """Return top and left, multiples of `step`, of the side x side crop with the largest mean absolute difference.

    Of equal crops it is the first in reading order. Along an axis shorter than the crop it is 0.
    """
    difference = cv2.absdiff(first, second).sum(axis=2, dtype=np.float64)
    height, width = (min(side, length) for length in difference.shape)
    # The sums are integers, exact in float64, so rounding cannot decide.
    sums = cv2.boxFilter(difference, cv2.CV_64F, (width, height), anchor=(0, 0), normalize=False)
    valid = sums[: difference.shape[0] - height + 1 : step, : difference.shape[1] - width + 1 : step]
    row, column = np.unravel_index(int(np.argmax(valid)), valid.shape)
    return int(row) * step, int(column) * step


def score_whole(image: Image, hr: Image, border: int) -> Scores:
    """Score a whole image; if it is too small for SSIM, SSIM is NaN and PSNR includes the border."""
    try:
        return score(image, hr, border)
    except ValueError:
        nothing = float("nan")
        return Scores(psnr(image, hr), nothing, psnr(luma(image), luma(hr)), nothing)


def write_sheet(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows one below another and write them atomically as a PNG file.

    Raises ValueError for no rows or a suffix other than .png, ShardsError if PNG cannot hold the size, OSError if the
    file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"expected a name that ends in .png, got {path.name!r}")
    encoded, data = cv2.imencode(".png", np.ascontiguousarray(draw_sheet(rows)[..., ::-1]))
    if not encoded:
        raise ShardsError(one_line(f"{path}: expected a size that PNG can hold, got {len(rows)} rows"))
    write_atomically(path, data.tobytes())


def draw_sheet(rows: Sequence[Row]) -> Image:
    """Draw the rows one below another and return the image."""
    if not rows:
        raise ValueError("expected at least one row, got none")
    columns = max(len(row.panels) for row in rows)
    cells = [[enlarge_crop(panel.picture) for panel in row.panels] for row in rows]
    wide = max(PANEL, *(cell.shape[1] for row_cells in cells for cell in row_cells))
    width = 2 * MARGIN + columns * wide + (columns - 1) * GAP
    strips = [draw_row(row, row_cells, wide, width) for row, row_cells in zip(rows, cells, strict=True)]
    edge = np.full((MARGIN, width, 3), PAPER, np.uint8)
    return np.concatenate([edge, *strips])


def draw_row(row: Row, cells: Sequence[Image], wide: int, width: int) -> Image:
    """Draw one row: a heading, the crops in columns of `wide` pixels, and their captions."""
    head = LINE + 10
    tall = max(cell.shape[0] for cell in cells)
    lines = max(len(panel.caption) for panel in row.panels)
    canvas = np.full((head + tall + 8 + lines * LINE + MARGIN, width, 3), PAPER, np.uint8)
    note_wide = text_width(row.note, FONT, TEXT)
    draw_text(canvas, row.note, width - MARGIN - note_wide, LINE - 6, FONT, TEXT, PALE)
    draw_text(canvas, shorten(row.name, width - 2 * MARGIN - note_wide - GAP), MARGIN, LINE - 6, BOLD, HEADING, INK)
    for column, (panel, cell) in enumerate(zip(row.panels, cells, strict=True)):
        left = MARGIN + column * (wide + GAP)
        canvas[head : head + cell.shape[0], left : left + cell.shape[1]] = cell
        for number, line in enumerate(panel.caption):
            font, ink = (FONT, PALE) if number else (BOLD, INK)
            draw_text(canvas, line, left, head + tall + 8 + LINE * (number + 1) - 6, font, TEXT, ink)
    return canvas


def enlarge_crop(picture: Image) -> Image:
    """Enlarge a crop by the largest integer factor that fits the panel; never shrink it."""
    factor = max(1, PANEL // max(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def draw_text(canvas: Image, text: str, left: int, y: int, font: int, size: float, ink: tuple[int, int, int]) -> None:
    """Draw a line of text with its baseline at `y`."""
    cv2.putText(canvas, to_drawable(text), (left, y), font, size, ink, 1, cv2.LINE_AA)


def text_width(text: str, font: int, size: float) -> int:
    """Return the width of a line of text in pixels."""
    (width, _), _ = cv2.getTextSize(to_drawable(text), font, size, 1)
    return int(width)


def shorten(name: str, room: int) -> str:
    """Shorten a name in the middle to fit a heading `room` pixels wide."""
    if text_width(name, BOLD, HEADING) <= room:
        return name
    for kept in range(len(name) - 1, 0, -1):
        short = f"{name[: (kept + 1) // 2]}...{name[len(name) - kept // 2 :]}"
        if text_width(short, BOLD, HEADING) <= room:
            return short
    return "..."


def to_drawable(text: str) -> str:
    """Return `text` with only characters that OpenCV can draw: printable ones since version 5, ASCII before."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    if UNICODE:
        return text
    plain = unicodedata.normalize("NFKD", text)
    return "".join(letter if letter.isascii() else "?" for letter in plain if not unicodedata.combining(letter))
