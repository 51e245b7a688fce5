"""Training losses between a network's output and the HR image, and their weighted sum.

Images are RGB in [0, 1], floating point (N, 3, H, W), of equal shape; every loss is a scalar tensor.
Losses are computed in float32 or better, even under autocast: bfloat16 is too coarse to average small differences, and
half-precision FFTs overflow and take only powers of two. A NaN in either image makes every loss NaN.
The default sum is the published training loss (Sun et al., "ShuffleMixer", NeurIPS 2022): L = L1 + 0.1 · FFT.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import Tensor

CHARBONNIER_EPS = 1e-3


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses in the sum, named after the functions below; a loss of weight 0 is not computed.

    Raises ValueError for a negative or non-finite weight, and if all are 0.
    """

    l1: float = 1.0
    charbonnier: float = 0.0
    fft: float = 0.1
    fft_amplitude: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"the weight of {name} must be finite and at least 0, got {weight}")
        if not any(asdict(self).values()):
            raise ValueError(f"one of the weights of {', '.join(asdict(self))} must be above 0, got 0 for all")


@dataclass(frozen=True)
class Losses:
    """`total`, the scalar to minimise, and its `parts` for logging.

    `parts` holds the losses with a weight above 0, unweighted and detached, in the order of `LossConfig`.
    """

    total: Tensor
    parts: dict[str, Tensor]


def l1(sr: Tensor, hr: Tensor) -> Tensor:
    """Return the mean of |sr − hr|; ValueError for unequal shapes."""
    return _Comparison(sr, hr).l1()


def charbonnier(sr: Tensor, hr: Tensor) -> Tensor:
    """Return the mean of √((sr − hr)² + ε²) with ε = 1e-3: L1 made smooth around 0, ε for equal images.

    Source: Lai et al., "Deep Laplacian Pyramid Networks", CVPR 2017, after Charbonnier et al., ICIP 1994.
    Raises ValueError for unequal shapes.
    """
    return _Comparison(sr, hr).charbonnier()


def fft(sr: Tensor, hr: Tensor) -> Tensor:
    """Return the mean absolute difference of the real and imaginary parts of `rfft2(sr)` and `rfft2(hr)`.

    The transforms are unnormalised, as in ShuffleMixer's published training code. Raises ValueError for unequal shapes.
    """
    return _Comparison(sr, hr).fft()


def fft_amplitude(sr: Tensor, hr: Tensor) -> Tensor:
    """Return the mean of ||rfft2(sr)| − |rfft2(hr)||, unnormalised. Phases, hence circular shifts, do not count.

    Source: Fuoli et al., "Fourier Space Losses for Efficient Perceptual Image Super-Resolution", ICCV 2021, without
    their window and phase term. Amplitudes of `sr` that are 0 get gradient 0. Raises ValueError for unequal shapes.
    """
    return _Comparison(sr, hr).fft_amplitude()


def combined(sr: Tensor, hr: Tensor, config: LossConfig) -> Losses:
    """Return the sum of the losses as weighted by `config`; ValueError for unequal shapes."""
    pair = _Comparison(sr, hr)
    weights = {name: weight for name, weight in asdict(config).items() if weight > 0}
    parts: dict[str, Tensor] = {name: getattr(pair, name)() for name in weights}
    total = torch.stack([weight * parts[name] for name, weight in weights.items()]).sum()
    return Losses(total, {name: part.detach() for name, part in parts.items()})


class _Comparison:
    """Two images, with their difference and spectra shared by the losses; spectra are computed once, on demand."""

    def __init__(self, sr: Tensor, hr: Tensor) -> None:
        if sr.shape != hr.shape:
            raise ValueError(f"expected images of one shape, got {tuple(sr.shape)} and {tuple(hr.shape)}")
        precision = torch.promote_types(torch.promote_types(sr.dtype, hr.dtype), torch.float32)
        self.hr = hr.to(precision)
        self.difference = sr.to(precision) - self.hr

    @cached_property
    def difference_spectrum(self) -> Tensor:
        # The FFT is linear: the spectrum of the difference is the difference of the spectra, but loses no digits.
        return _rfft2(self.difference)

    @cached_property
    def hr_spectrum(self) -> Tensor:
        return _rfft2(self.hr)

    def l1(self) -> Tensor:
        return self.difference.abs().mean()

    def charbonnier(self) -> Tensor:
        return (self.difference.square() + CHARBONNIER_EPS**2).sqrt().mean()

    def fft(self) -> Tensor:
        return torch.view_as_real(self.difference_spectrum).abs().mean()

    def fft_amplitude(self) -> Tensor:
        # At 0 the complex `abs` has gradient 0; √(re² + im²) would have NaN.
        sr_spectrum = self.hr_spectrum + self.difference_spectrum
        return (sr_spectrum.abs() - self.hr_spectrum.abs()).abs().mean()


def _rfft2(image: Tensor) -> Tensor:
    with torch.autocast(device_type=image.device.type, enabled=False):
        spectrum: Tensor = torch.fft.rfft2(image)
        return spectrum
