"""Training losses between a network's output and the true image, alone and added up.

Tensors are RGB in [0, 1], floating point, (N, 3, H, W), of one shape; every loss is a scalar.
All compute in float32 or better, even under autocast: bfloat16 has too few digits to average small differences, and
half-precision FFTs take powers of two only, and overflow. A NaN in either image makes each loss NaN.
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
    """The weight of each loss in the sum, by the names of the functions here; 0 leaves a loss out.

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
    """Scalar tensors: `total` is what to minimise.

    `parts` are to be logged: unweighted and detached, those with a weight above 0, in the order of `LossConfig`.
    """

    total: Tensor
    parts: dict[str, Tensor]


def l1(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean of |sr − hr|. Raises ValueError for unequal shapes."""
    return _Comparison(sr, hr).l1()


def charbonnier(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean of √((sr − hr)² + ε²) with ε = 1e-3: L1, made smooth around 0; ε for equal images.

    Source: Lai et al., "Deep Laplacian Pyramid Networks", CVPR 2017, after Charbonnier et al., ICIP 1994.
    Raises ValueError for unequal shapes.
    """
    return _Comparison(sr, hr).charbonnier()


def fft(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean absolute difference between the real and imaginary parts of the unnormalised `rfft2(sr)` and `rfft2(hr)`.

    Source: ShuffleMixer's published training code. Raises ValueError for unequal shapes.
    """
    return _Comparison(sr, hr).fft()


def fft_amplitude(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean of ||rfft2(sr)| − |rfft2(hr)||, unnormalised: blind to phases, so shifting an image in a circle is free.

    Source: Fuoli et al., "Fourier Space Losses for Efficient Perceptual Image Super-Resolution", ICCV 2021, without
    their window and phases. Where an amplitude of `sr` is 0, its gradient is 0. Raises ValueError for unequal shapes.
    """
    return _Comparison(sr, hr).fft_amplitude()


def combined(sr: Tensor, hr: Tensor, config: LossConfig) -> Losses:
    """Give the weighted sum of the losses that `config` weighs above 0; no other is computed.

    Raises ValueError for unequal shapes.
    """
    pair = _Comparison(sr, hr)
    weights = {name: weight for name, weight in asdict(config).items() if weight > 0}
    parts: dict[str, Tensor] = {name: getattr(pair, name)() for name in weights}
    total = torch.stack([weight * parts[name] for name, weight in weights.items()]).sum()
    return Losses(total, {name: part.detach() for name, part in parts.items()})


class _Comparison:
    """Two images with what the losses share of them, each made when first asked for: two transforms at most."""

    def __init__(self, sr: Tensor, hr: Tensor) -> None:
        if sr.shape != hr.shape:
            raise ValueError(f"expected images of one shape, got {tuple(sr.shape)} and {tuple(hr.shape)}")
        precision = torch.promote_types(torch.promote_types(sr.dtype, hr.dtype), torch.float32)
        self.hr = hr.to(precision)
        self.difference = sr.to(precision) - self.hr

    @cached_property
    def difference_spectrum(self) -> Tensor:
        # The transform is linear: that of the difference is the difference of both, with its small digits kept.
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
        # The complex `abs` has gradient 0 at 0, where √(re² + im²) would give NaN.
        sr_spectrum = self.hr_spectrum + self.difference_spectrum
        return (sr_spectrum.abs() - self.hr_spectrum.abs()).abs().mean()


def _rfft2(image: Tensor) -> Tensor:
    with torch.autocast(device_type=image.device.type, enabled=False):
        spectrum: Tensor = torch.fft.rfft2(image)
        return spectrum
