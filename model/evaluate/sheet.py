"""Sample sheets: what a network makes of images, beside bicubic and the truth, as one PNG.

Each image is a row of four crops of the same place: LR with its pixels enlarged, bicubic, the network, HR. The place
is where the network and bicubic differ most. Images are uint8 arrays (H, W, 3), RGB.
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

PANEL = 288  # pixels, the longer side of a crop as it is drawn, or a little less: crops grow by whole factors
MARGIN, GAP = 24, 16
LINE = 22  # from one line of text to the next
FONT, BOLD = cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX
HEADING, TEXT = 0.62, 0.5  # sizes of text
INK, PALE, PAPER = (32, 32, 32), (112, 112, 112), (255, 255, 255)
UNICODE = int(cv2.__version__.split(".")[0]) >= 5  # before, OpenCV's letters were ASCII


@dataclass(frozen=True)
class Panel:
    """One crop, and the lines under it: the first says what it is."""

    picture: Image
    caption: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One image: its name, a line about the crop, and the panels from left to right."""

    name: str
    note: str
    panels: tuple[Panel, ...]


def make_row(name: str, lr: Image, sr: Image, bicubic: Image, hr: Image, scale: int, side: int = 96) -> Row:
    """Crop where `sr` and `bicubic` differ most, and note what they score.

    Args:
        name: the image's name.
        lr: (H, W, 3).
        sr: what the network made of `lr`, (H·scale, W·scale, 3); so are `bicubic` and `hr`.
        bicubic: what bicubic made of it.
        hr: the truth.
        scale: of both sides; it is also the border that the scores of whole images leave out.
        side: of the crop, in HR pixels; images smaller than that are shown whole.

    Raises:
        ValueError: the sizes differ, or an array is none of these.
    """
    expected = (lr.shape[0] * scale, lr.shape[1] * scale, 3)
    for what, image in (("sr", sr), ("bicubic", bicubic), ("hr", hr)):
        if image.shape != expected or image.dtype != np.uint8:
            raise ValueError(f"{name}: {what}: expected uint8 {expected}, got {image.dtype} {image.shape}")
    if side < 1:
        raise ValueError(f"side must be at least 1 pixel, got {side}")
    top, left = widest_difference(sr, bicubic, scale, side)
    region = np.s_[top : top + side, left : left + side]
    height, width = hr[region].shape[:2]
    # Top and left are multiples of the scale, so that whole LR pixels begin there.
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


def widest_difference(first: Image, second: Image, step: int, side: int) -> tuple[int, int]:
    """Top and left, multiples of `step`, of the side x side crop with the largest mean absolute difference.

    The first in reading order where several are equal. Of an image smaller than the crop, 0 along that axis.
    """
    difference = cv2.absdiff(first, second).sum(axis=2, dtype=np.float64)
    height, width = (min(side, length) for length in difference.shape)
    # The sums are whole numbers, which doubles hold exactly: no crop wins by rounding.
    sums = cv2.boxFilter(difference, cv2.CV_64F, (width, height), anchor=(0, 0), normalize=False)
    valid = sums[: difference.shape[0] - height + 1 : step, : difference.shape[1] - width + 1 : step]
    row, column = np.unravel_index(int(np.argmax(valid)), valid.shape)
    return int(row) * step, int(column) * step


def score_whole(image: Image, hr: Image, border: int) -> Scores:
    """Score a whole image; one too small for SSIM gets PSNR without a border, and no number for SSIM."""
    try:
        return score(image, hr, border)
    except ValueError:
        nothing = float("nan")
        return Scores(psnr(image, hr), nothing, psnr(luma(image), luma(hr)), nothing)


def write_sheet(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows below each other and write them as a PNG file, by a temporary file and a rename.

    Raises ValueError for no rows or another suffix than .png, OSError where the file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"expected a name that ends in .png, got {path.name!r}")
    encoded, data = cv2.imencode(".png", np.ascontiguousarray(draw_sheet(rows)[..., ::-1]))
    if not encoded:
        raise ShardsError(one_line(f"{path}: expected a size that PNG can hold, got {len(rows)} rows"))
    write_atomically(path, data.tobytes())


def draw_sheet(rows: Sequence[Row]) -> Image:
    """Draw the rows below each other: uint8 (H, W, 3)."""
    if not rows:
        raise ValueError("expected at least one row, got none")
    columns = max(len(row.panels) for row in rows)
    cells = [[fit(panel.picture) for panel in row.panels] for row in rows]
    wide = max(PANEL, *(cell.shape[1] for row_cells in cells for cell in row_cells))
    width = 2 * MARGIN + columns * wide + (columns - 1) * GAP
    strips = [draw_row(row, row_cells, wide, width) for row, row_cells in zip(rows, cells, strict=True)]
    edge = np.full((MARGIN, width, 3), PAPER, np.uint8)
    return np.concatenate([edge, *strips])


def draw_row(row: Row, cells: Sequence[Image], wide: int, width: int) -> Image:
    """Draw one row: a heading, the pictures in columns of `wide` pixels, and the captions under them."""
    head = LINE + 10
    tall = max(cell.shape[0] for cell in cells)
    lines = max(len(panel.caption) for panel in row.panels)
    canvas = np.full((head + tall + 8 + lines * LINE + MARGIN, width, 3), PAPER, np.uint8)
    note_wide = text_width(row.note, FONT, TEXT)
    write(canvas, row.note, width - MARGIN - note_wide, LINE - 6, FONT, TEXT, PALE)
    write(canvas, shorten(row.name, width - 2 * MARGIN - note_wide - GAP), MARGIN, LINE - 6, BOLD, HEADING, INK)
    for column, (panel, cell) in enumerate(zip(row.panels, cells, strict=True)):
        left = MARGIN + column * (wide + GAP)
        canvas[head : head + cell.shape[0], left : left + cell.shape[1]] = cell
        for number, line in enumerate(panel.caption):
            font, ink = (FONT, PALE) if number else (BOLD, INK)
            write(canvas, line, left, head + tall + 8 + LINE * (number + 1) - 6, font, TEXT, ink)
    return canvas


def fit(picture: Image) -> Image:
    """Enlarge a crop by the largest whole factor that keeps it within a panel; never shrink it."""
    factor = max(1, PANEL // max(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def write(canvas: Image, text: str, left: int, base: int, font: int, size: float, ink: tuple[int, int, int]) -> None:
    """Write a line with its baseline at `base`."""
    cv2.putText(canvas, drawable(text), (left, base), font, size, ink, 1, cv2.LINE_AA)


def text_width(text: str, font: int, size: float) -> int:
    """Tell how many pixels wide a line becomes."""
    (width, _), _ = cv2.getTextSize(drawable(text), font, size, 1)
    return int(width)


def shorten(name: str, room: int) -> str:
    """Leave out the middle of a name too wide for `room` pixels of heading."""
    if text_width(name, BOLD, HEADING) <= room:
        return name
    for kept in range(len(name) - 1, 0, -1):
        short = f"{name[: (kept + 1) // 2]}...{name[len(name) - kept // 2 :]}"
        if text_width(short, BOLD, HEADING) <= room:
            return short
    return "..."


def drawable(text: str) -> str:
    """Give `text` in letters that OpenCV draws: all printable ones since version 5, ASCII before."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    if UNICODE:
        return text
    plain = unicodedata.normalize("NFKD", text)
    return "".join(letter if letter.isascii() else "?" for letter in plain if not unicodedata.combining(letter))
