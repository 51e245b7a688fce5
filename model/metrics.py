"""PSNR and SSIM as super-resolution papers report them: on RGB and on MATLAB's Y, without a border.

Images are uint8 RGB arrays (H, W, 3); channels are float64 arrays (H, W) with values in [0, 255].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Channel = NDArray[np.float64]

PEAK = 255.0
WINDOW = 11  # SSIM's Gaussian window, in pixels
SIGMA = 1.5


@dataclass(frozen=True)
class Scores:
    """Scores of one image, or means over several: PSNR in dB, SSIM at most 1."""

    psnr_rgb: float
    ssim_rgb: float
    psnr_y: float
    ssim_y: float


def luma(image: Image) -> Channel:
    """Return MATLAB's Y, unrounded: 16 + (65.481 R + 128.553 G + 24.966 B) / 255, float64 (H, W) in [16, 235].

    Source: ITU-R BT.601 as in MATLAB's `rgb2ycbcr`. (OpenCV's YCrCb has another Y; its PSNR is 1.3 dB lower.)
    """
    weighted: Channel = image.astype(np.float64) @ np.array([65.481, 128.553, 24.966])
    return 16.0 + weighted / 255.0


def psnr(first: NDArray[np.generic], second: NDArray[np.generic]) -> float:
    """Return the PSNR over all values, 10 log10(255² / MSE) in dB: inf for equal images, NaN if a value is NaN."""
    _check_same_shape(first, second)
    error = np.mean(np.square(first.astype(np.float64) - second.astype(np.float64)))
    return float("inf") if error == 0 else float(10 * np.log10(PEAK**2 / error))


def ssim(first: Channel, second: Channel) -> float:
    """Return the structural similarity of two channels.

    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural
    similarity", 2004: Gaussian window of 11 x 11 pixels, sigma 1.5, K1 = 0.01, K2 = 0.03, averaged over the window
    positions that lie wholly inside. Raises ValueError for unequal shapes or fewer than 11 x 11 pixels.
    """
    _check_same_shape(first, second)
    if min(first.shape) < WINDOW:
        raise ValueError(f"SSIM needs at least {WINDOW} pixels in height and width, got shape {first.shape}")
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    mean1, mean2 = _smooth(first), _smooth(second)
    variance1 = _smooth(first * first) - mean1 * mean1
    variance2 = _smooth(second * second) - mean2 * mean2
    covariance = _smooth(first * second) - mean1 * mean2
    luminance = (2 * mean1 * mean2 + c1) / (mean1 * mean1 + mean2 * mean2 + c1)
    contrast_structure = (2 * covariance + c2) / (variance1 + variance2 + c2)
    return float(np.mean(luminance * contrast_structure))


def score(sr: Image, hr: Image, border: int) -> Scores:
    """Score a network's output against the HR image, ignoring `border` pixels along every edge.

    PSNR of RGB is over all values, SSIM of RGB the mean over the channels. Raises ValueError for arrays that are
    not uint8 (H, W, 3) of equal shape, a negative border, or fewer than 11 x 11 pixels inside it.
    """
    for image in (sr, hr):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected a uint8 image of shape (H, W, 3), got {image.dtype} {image.shape}")
    _check_same_shape(sr, hr)
    if border < 0:
        raise ValueError(f"border must be at least 0, got {border}")
    height, width = sr.shape[:2]
    inside = np.s_[border : height - border, border : width - border]
    if (reason := size_error(height, width, border)) is not None:
        raise ValueError(reason)
    sr, hr = sr[inside], hr[inside]
    channels = [ssim(sr[..., c].astype(np.float64), hr[..., c].astype(np.float64)) for c in range(3)]
    sr_y, hr_y = luma(sr), luma(hr)
    return Scores(psnr(sr, hr), sum(channels) / 3, psnr(sr_y, hr_y), ssim(sr_y, hr_y))


def size_error(height: int, width: int, border: int) -> str | None:
    """Return why an image of that size cannot be scored inside the border; None if it can."""
    if min(height, width) - 2 * border >= WINDOW:
        return None
    return f"SSIM needs {WINDOW} x {WINDOW} pixels inside a border of {border}, got {height} x {width}"


def mean_scores(scores: Iterable[Scores]) -> Scores:
    """Return the mean of each score over images; ValueError if there are none."""
    rows = [astuple(one) for one in scores]
    if not rows:
        raise ValueError("expected the scores of at least one image, got none")
    return Scores(*(float(value) for value in np.mean(rows, axis=0)))


def _smooth(channel: Channel) -> Channel:
    """Filter with SSIM's window, keeping only positions where the window lies wholly inside: (H - 10, W - 10)."""
    window = cv2.getGaussianKernel(WINDOW, SIGMA)
    margin = WINDOW // 2
    smoothed = cv2.sepFilter2D(channel, cv2.CV_64F, window, window)[margin:-margin, margin:-margin]
    return np.asarray(smoothed, dtype=np.float64)


def _check_same_shape(first: NDArray[np.generic], second: NDArray[np.generic]) -> None:
    if first.shape != second.shape:
        raise ValueError(f"expected images of one shape, got {first.shape} and {second.shape}")
