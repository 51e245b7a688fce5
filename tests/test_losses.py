"""The losses against their formulas, under autocast, and their refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.losses import LossConfig, combined, fft, l1


def images(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(*shape, generator=generator), torch.rand(*shape, generator=generator)


def test_values_follow_the_published_formulas() -> None:
    sr, hr = images(2, 3, 12, 15)
    spectra = [np.fft.rfft2(image.double().numpy()) for image in (sr, hr)]
    stacked = [np.stack([spectrum.real, spectrum.imag]) for spectrum in spectra]
    assert fft(sr, hr).item() == pytest.approx(np.abs(stacked[0] - stacked[1]).mean(), rel=1e-5)
    assert l1(sr, hr).item() == pytest.approx((sr - hr).abs().double().mean().item(), rel=1e-5)


def test_losses_add_up_and_carry_gradients() -> None:
    sr, hr = images(1, 3, 8, 8)
    sr.requires_grad_()
    losses = combined(sr, hr, LossConfig(fft_weight=0.25))
    assert losses.total.item() == pytest.approx(l1(sr, hr).item() + 0.25 * fft(sr, hr).item())
    assert not losses.l1.requires_grad
    assert not losses.fft.requires_grad
    (gradient,) = torch.autograd.grad(losses.total, sr)
    (of_l1,) = torch.autograd.grad(l1(sr, hr), sr)
    (of_fft,) = torch.autograd.grad(fft(sr, hr), sr)
    torch.testing.assert_close(gradient, of_l1 + 0.25 * of_fft)


def test_a_weight_of_zero_leaves_l1_alone() -> None:
    sr, hr = images(1, 3, 8, 8)
    losses = combined(sr, hr, LossConfig(fft_weight=0))
    assert losses.total.item() == l1(sr, hr).item()
    assert losses.fft.item() == 0


def test_fft_is_float32_under_autocast() -> None:
    # 15 x 21 is no power of two, and 2 summed over 200 x 200 overflows float16: half precision fails on both.
    sr, hr = images(1, 3, 15, 21)
    expected = fft(sr, hr).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fft(sr.half(), hr.half()).dtype == torch.float32
        assert fft(sr, hr).item() == expected
        large = fft(2 * torch.ones(1, 1, 200, 200).half(), torch.zeros(1, 1, 200, 200).half())
    assert large.item() == pytest.approx(2 * 200 * 200 / (2 * 200 * 101), rel=1e-6)


def test_float64_stays_float64() -> None:
    sr, hr = (image.double() for image in images(1, 3, 4, 4))
    assert combined(sr, hr, LossConfig()).total.dtype == torch.float64


def test_unequal_shapes_are_refused() -> None:
    for loss in (l1, fft):
        with pytest.raises(ValueError, match=r"one shape, got \(1, 3, 8, 8\) and \(1, 3, 1, 1\)"):
            loss(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 1, 1))


@pytest.mark.parametrize("weight", [-0.1, float("inf"), float("nan")])
def test_senseless_weights_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="fft_weight must be finite and at least 0, got"):
        LossConfig(fft_weight=weight)
