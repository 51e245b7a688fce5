"""Losses: published formulas, gradients, the weighted sum, autocast, invalid arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import losses
from model.losses import LossConfig, combined, fft, l1

Loss = Callable[[Tensor, Tensor], Tensor]
NAMES = [field.name for field in fields(LossConfig)]
ALL = LossConfig(l1=0.5, charbonnier=0.25, fft=0.125, fft_amplitude=2)
NONE = dict.fromkeys(NAMES, 0.0)
SHAPES = [(2, 3, 12, 15), (1, 3, 9, 8), (2, 1, 1, 1), (1, 3, 5, 2), (1, 2, 1, 7)]  # widths odd and even


def images(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(*shape, generator=generator), torch.rand(*shape, generator=generator)


def loss_function(name: str) -> Loss:
    function: Loss = getattr(losses, name)
    return function


def expected(name: str, sr: NDArray[np.float64], hr: NDArray[np.float64]) -> float:
    """Compute the published formula with numpy."""
    if name == "l1":
        return float(np.abs(sr - hr).mean())
    if name == "charbonnier":
        return float(np.sqrt((sr - hr) ** 2 + 1e-6).mean())
    a, b = np.fft.rfft2(sr), np.fft.rfft2(hr)
    if name == "fft":
        return float(np.abs([a.real - b.real, a.imag - b.imag]).mean())
    assert name == "fft_amplitude"
    return float(np.abs(np.abs(a) - np.abs(b)).mean())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_values_follow_the_published_formulas(name: str, shape: tuple[int, ...]) -> None:
    sr, hr = (image.double() for image in images(*shape))
    value = loss_function(name)(sr, hr)
    assert (value.dtype, value.shape) == (torch.float64, ())
    assert value.item() == pytest.approx(expected(name, sr.numpy(), hr.numpy()), rel=1e-12)
    single = loss_function(name)(sr.float(), hr.float())
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_match_finite_differences(name: str) -> None:
    sr, hr = (image.double().requires_grad_() for image in images(1, 2, 4, 5))
    assert torch.autograd.gradcheck(loss_function(name), (sr, hr))


@pytest.mark.parametrize("sr_value", [0.0, 0.5])
@pytest.mark.parametrize("hr_value", [0.0, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_for_constant_images(name: str, hr_value: float, sr_value: float) -> None:
    # Amplitudes and differences of 0, where square roots and quotients could give NaN.
    sr = torch.full((1, 3, 8, 8), sr_value, requires_grad=True)
    value = loss_function(name)(sr, torch.full((1, 3, 8, 8), hr_value))
    (gradient,) = torch.autograd.grad(value, sr)
    assert gradient.isfinite().all()
    if sr_value == hr_value:
        assert value.item() == pytest.approx(1e-3 if name == "charbonnier" else 0)
        assert not gradient.any()


def test_amplitude_loss_ignores_circular_shifts() -> None:
    image, _ = images(1, 3, 12, 16)
    shifted = image.roll((3, 5), dims=(-2, -1))
    assert losses.fft_amplitude(shifted, image).item() < 1e-4 * fft(shifted, image).item()


def test_total_and_its_gradient_are_weighted_sums() -> None:
    sr, hr = images(2, 3, 8, 10)
    sr.requires_grad_()
    result = combined(sr, hr, ALL)
    assert list(result.parts) == NAMES
    expected_gradient = torch.zeros_like(sr)
    for name, weight in asdict(ALL).items():
        alone = loss_function(name)(sr, hr)
        assert not result.parts[name].requires_grad
        assert result.parts[name].item() == alone.item()
        expected_gradient += weight * torch.autograd.grad(alone, sr)[0]
    total = sum(weight * result.parts[name].item() for name, weight in asdict(ALL).items())
    assert result.total.item() == pytest.approx(total)
    torch.testing.assert_close(torch.autograd.grad(result.total, sr)[0], expected_gradient)


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_weight_zero_are_not_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sr, hr = images(1, 3, 8, 8)

    def refuse(self: object) -> Tensor:
        raise AssertionError("computed despite a weight of 0")

    for other in set(NAMES) - {name}:
        monkeypatch.setattr(losses._Comparison, other, refuse)
    result = combined(sr, hr, LossConfig(**NONE | {name: 1}))
    assert list(result.parts) == [name]
    assert result.total.item() == result.parts[name].item() == loss_function(name)(sr, hr).item()


def test_losses_share_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    transform = torch.fft.rfft2

    def counted(image: Tensor) -> Tensor:
        calls.append(image)
        spectrum: Tensor = transform(image)
        return spectrum

    monkeypatch.setattr(torch.fft, "rfft2", counted)
    sr, hr = images(1, 3, 8, 8)
    for config, count in ((ALL, 2), (LossConfig(fft=1), 1), (LossConfig(fft=0, charbonnier=1), 0)):
        calls.clear()
        combined(sr, hr, config)
        assert len(calls) == count


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_nan_reaches_the_total(name: str, side: int) -> None:
    pair = images(2, 3, 8, 8)
    pair[side][1, 2, 3, 4] = torch.nan
    assert combined(*pair, LossConfig(**NONE | {name: 0.1})).total.isnan()
    assert combined(*pair, ALL).total.isnan()


def test_bfloat16_images_are_compared_in_float32() -> None:
    sr, hr = (image.bfloat16() for image in images(1, 3, 15, 21))
    sr.requires_grad_()
    result = combined(sr, hr, ALL)
    wide = combined(sr.float(), hr.float(), ALL)
    assert result.total.dtype == torch.float32
    assert result.total.item() == wide.total.item()
    (gradient,) = torch.autograd.grad(result.total, sr)
    assert gradient.dtype == torch.bfloat16
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["fft", "fft_amplitude"])
def test_ffts_are_float32_under_autocast(name: str) -> None:
    # Half precision fails on both: 15 x 21 is not a power of two, and 2 summed over 200 x 200 overflows float16.
    function = loss_function(name)
    sr, hr = images(1, 3, 15, 21)
    plain = function(sr, hr).item()
    bright, dark = 2 * torch.ones(1, 1, 200, 200), torch.zeros(1, 1, 200, 200)
    large = function(bright, dark).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert function(sr.half(), hr.half()).dtype == torch.float32
        assert function(sr, hr).item() == plain
        assert function(bright.half(), dark.half()).item() == large
    assert large == pytest.approx(expected(name, bright.double().numpy(), dark.double().numpy()), rel=1e-6)


def test_default_is_the_published_loss(shared: Path) -> None:
    with np.load(shared / "golden" / "shufflemixer_tiny_x4.npz") as data:
        sr, hr = torch.tensor(data["output"]), torch.tensor(data["target"])
        result = combined(sr, hr, LossConfig())
        assert list(result.parts) == ["l1", "fft"]
        assert result.parts["l1"].item() == pytest.approx(data["loss_l1"].item(), rel=1e-5)
        assert result.parts["fft"].item() == pytest.approx(data["loss_fft"].item(), rel=1e-5)
        published = data["loss_l1"].item() + 0.1 * data["loss_fft"].item()
    assert result.total.item() == pytest.approx(published, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_unequal_shapes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(1, 3, 8, 8\) and \(1, 3, 1, 1\)"):
        loss_function(name)(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 1, 1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weight", [-0.1, float("inf"), float("nan")])
def test_invalid_weights_are_refused(name: str, weight: float) -> None:
    with pytest.raises(ValueError, match=f"the weight of {name} must be finite and at least 0, got {weight}"):
        LossConfig(**{name: weight})


def test_all_weights_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of the weights of l1, charbonnier, .* must be above 0, got 0 for all"):
        LossConfig(**NONE)
    assert l1(*images(1, 3, 2, 2)) == combined(*images(1, 3, 2, 2), LossConfig(fft=0)).total
