"""Enlarging alpha channels by MATLAB's bicubic."""

from __future__ import annotations

import numpy as np

from loader.resize.imresize import enlarge
from model.enlarge.pictures import Pixels
from model.enlarge.tiles import Tiling, cut_axis

STRIP = 1 << 18  # LR pixels enlarged at once
BICUBIC_RADIUS = 3  # LR pixels


def enlarge_alpha(alpha: Pixels, scale: int) -> Pixels:
    """Enlarge uint8 (H, W), strip by strip: `enlarge` needs several float64 copies."""
    height, width = alpha.shape
    large = np.empty((height * scale, width * scale), np.uint8)
    for rows in cut_axis(height, Tiling(max(1, STRIP // width), BICUBIC_RADIUS)):
        strip = enlarge(alpha[rows.read_start : rows.read_stop], scale)[(rows.start - rows.read_start) * scale :]
        large[rows.start * scale : rows.stop * scale] = strip[: (rows.stop - rows.start) * scale]
    return large
