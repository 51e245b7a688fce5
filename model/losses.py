"""Training losses between a network's output and the true image.

Tensors are RGB in [0, 1], floating point, (N, 3, H, W), of one shape. The sum is the published training loss
(Sun et al., "ShuffleMixer", NeurIPS 2022): L = L1 + 0.1 · FFT.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossConfig:
    """How the losses add up. Raises ValueError for a negative or non-finite weight."""

    fft_weight: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.fft_weight < float("inf"):
            raise ValueError(f"fft_weight must be finite and at least 0, got {self.fft_weight}")


@dataclass(frozen=True)
class Losses:
    """Scalar tensors: `total` is what to minimise; the parts are unweighted and detached, to be logged."""

    total: Tensor
    l1: Tensor
    fft: Tensor


def l1(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean absolute difference, a scalar. Raises ValueError for unequal shapes."""
    return _difference(sr, hr).abs().mean()


def fft(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean absolute difference between the real and imaginary parts of `rfft2(sr)` and `rfft2(hr)`, a scalar.

    The transform is linear, so one transform of the difference serves for two. It is unnormalised, and runs
    in float32 even under autocast: half-precision FFTs take powers of two only, and overflow.
    Raises ValueError for unequal shapes.
    """
    with torch.autocast(device_type=sr.device.type, enabled=False):
        spectrum = torch.fft.rfft2(_difference(sr, hr))
        return torch.view_as_real(spectrum).abs().mean()


def combined(sr: Tensor, hr: Tensor, config: LossConfig) -> Losses:
    """Give L1 + fft_weight · FFT. With a weight of 0 the FFT is not computed, and counts as 0."""
    pixels = l1(sr, hr)
    if config.fft_weight == 0:
        return Losses(pixels, pixels.detach(), torch.zeros_like(pixels))
    frequencies = fft(sr, hr)
    return Losses(pixels + config.fft_weight * frequencies, pixels.detach(), frequencies.detach())


def _difference(sr: Tensor, hr: Tensor) -> Tensor:
    """Subtract in float32 or better: bfloat16 has too few digits to average small differences."""
    if sr.shape != hr.shape:
        raise ValueError(f"expected images of one shape, got {tuple(sr.shape)} and {tuple(hr.shape)}")
    precision = torch.promote_types(torch.promote_types(sr.dtype, hr.dtype), torch.float32)
    return sr.to(precision) - hr.to(precision)
