"""PSNR, SSIM and Y, against independent implementations and hand-computed values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from model.metrics import Image, Scores, luma, mean_scores, psnr, score, ssim


def pair(height: int = 40, width: int = 52) -> tuple[Image, Image]:
    rng = np.random.default_rng(7)
    rows, columns = np.mgrid[:height, :width]
    smooth = 127 + 90 * np.sin(rows / 5)[..., None] * np.cos(columns[..., None] / (4 + np.arange(3)))
    noisy = smooth + rng.normal(0, 9, smooth.shape)
    return smooth.clip(0, 255).astype(np.uint8), noisy.clip(0, 255).astype(np.uint8)


def test_luma_of_known_colours() -> None:
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], dtype=np.uint8)
    assert luma(colours).dtype == np.float64
    np.testing.assert_allclose(luma(colours), [[16, 235, 81.481, 144.553, 40.966]], atol=1e-10)
    # Unrounded, unlike MATLAB's rgb2ycbcr of uint8.
    grey = np.full((1, 1, 3), 100, dtype=np.uint8)
    assert luma(grey)[0, 0] == pytest.approx(16 + 219 * 100 / 255)


def test_psnr_of_a_constant_difference() -> None:
    dark, light = np.full((4, 4), 100, np.uint8), np.full((4, 4), 90, np.uint8)
    assert psnr(dark, light) == pytest.approx(20 * math.log10(255 / 10))
    assert psnr(light, dark) == psnr(dark, light)
    assert psnr(dark, dark) == math.inf


def test_ssim_agrees_with_scikit_image() -> None:
    first, second = (image[..., 1].astype(np.float64) for image in pair())
    expected = structural_similarity(  # type: ignore[no-untyped-call]
        first, second, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    assert ssim(first, second) == pytest.approx(expected, abs=1e-9)
    assert ssim(first, first) == pytest.approx(1)


def test_score_crops_the_border_and_averages_channels() -> None:
    sr, hr = pair()
    inner_sr, inner_hr = sr[4:-4, 4:-4], hr[4:-4, 4:-4]
    scores = score(sr, hr, border=4)
    assert scores == score(inner_sr, inner_hr, border=0)
    assert scores.psnr_rgb == psnr(inner_sr, inner_hr)
    assert scores.psnr_y == psnr(luma(inner_sr), luma(inner_hr))
    assert scores.ssim_y == ssim(luma(inner_sr), luma(inner_hr))
    channels_of = [image.astype(np.float64) for image in (inner_sr, inner_hr)]
    channels = [ssim(channels_of[0][..., c], channels_of[1][..., c]) for c in range(3)]
    assert scores.ssim_rgb == pytest.approx(np.mean(channels))
    changed = sr.copy()
    changed[:4], changed[:, -4:] = 0, 255
    assert score(changed, hr, border=4) == scores
    assert score(changed, hr, border=3) != scores


def test_mean_scores() -> None:
    assert mean_scores([Scores(30, 0.5, 31, 0.75), Scores(32, 1, 35, 0.25)]) == Scores(31, 0.75, 33, 0.5)
    with pytest.raises(ValueError, match="at least one image, got none"):
        mean_scores([])


def test_wrong_arguments_are_refused() -> None:
    sr, hr = pair()
    with pytest.raises(ValueError, match=r"one shape, got \(40, 52, 3\) and \(40, 51, 3\)"):
        score(sr, hr[:, :-1], border=0)
    with pytest.raises(ValueError, match=r"uint8 image of shape \(H, W, 3\), got float64"):
        score(sr, hr.astype(np.float64), border=0)
    with pytest.raises(ValueError, match=r"uint8 image of shape \(H, W, 3\), got uint8 \(40, 52\)"):
        score(sr[..., 0], hr[..., 0], border=0)
    with pytest.raises(ValueError, match="border must be at least 0, got -1"):
        score(sr, hr, border=-1)
    with pytest.raises(ValueError, match="needs 11 x 11 pixels inside a border of 15, got 40 x 52"):
        score(sr, hr, border=15)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(np.zeros((10, 30)), np.zeros((10, 30)))
