"""The network: published sizes and names, golden values, and the reading of checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.checkpoints import CheckpointError, infer_config, load_checkpoint
from model.losses import LossConfig, combined
from model.shufflemixer import PRESETS, ShuffleMixer, ShuffleMixerConfig, concatenate_shuffled

NETWORKS = [(name, scale) for name in ("tiny", "base") for scale in (2, 3, 4)]
PARAMETERS = {
    ("tiny", 2): 108_435,
    ("tiny", 3): 113_715,
    ("tiny", 4): 112_659,
    ("base", 2): 393_939,
    ("base", 3): 414_739,
    ("base", 4): 410_579,
}
GIGA_MACS = {
    ("tiny", 2): "25.03",
    ("tiny", 3): "12.11",
    ("tiny", 4): "7.81",
    ("base", 2): "90.86",
    ("base", 3): "43.40",
    ("base", 4): "27.69",
}


@pytest.mark.parametrize(("name", "scale"), NETWORKS)
def test_sizes_are_the_published_ones(name: str, scale: int) -> None:
    network = ShuffleMixer.preset(name, scale)
    assert network.parameter_count() == PARAMETERS[name, scale]
    assert f"{network.multiply_accumulates(720, 1280) / 1e9:.2f}" == GIGA_MACS[name, scale]


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_output_has_the_scaled_size_for_odd_inputs(scale: int) -> None:
    network = ShuffleMixer.preset("tiny", scale)
    with torch.inference_mode():
        assert network(torch.rand(2, 3, 7, 11)).shape == (2, 3, 7 * scale, 11 * scale)


@pytest.fixture(scope="session")
def golden() -> Callable[[str, int], dict[str, NDArray[Any]]]:
    shared = os.environ.get("SRSHARDS_SHARED")
    if not shared:
        pytest.skip("SRSHARDS_SHARED is not set")

    def read(name: str, scale: int) -> dict[str, NDArray[Any]]:
        with np.load(Path(shared, "golden", f"shufflemixer_{name}_x{scale}.npz")) as archive:
            return {key: archive[key] for key in archive.files}

    return read


def relative_error(got: Tensor, expected: NDArray[Any]) -> float:
    return float(np.abs(got.detach().numpy() - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("name", "scale"), NETWORKS)
def test_golden_values(name: str, scale: int, golden: Callable[[str, int], dict[str, NDArray[Any]]]) -> None:
    data = golden(name, scale)
    network = ShuffleMixer.preset(name, scale)
    weights = {k.removeprefix("param/"): torch.tensor(v) for k, v in data.items() if k.startswith("param/")}
    assert list(network.state_dict()) == list(weights)
    network.load_state_dict(weights, strict=True)

    sr = network(torch.tensor(data["input"]))
    losses = combined(sr, torch.tensor(data["target"]), LossConfig(fft_weight=0.1))
    torch.autograd.backward(losses.total)

    assert relative_error(sr, data["output"]) < 1e-5
    assert relative_error(losses.l1, data["loss_l1"]) < 1e-5
    assert relative_error(losses.fft, data["loss_fft"]) < 1e-5
    for key in ("to_feat.weight", "tail.weight"):
        gradient = network.get_parameter(key).grad
        assert gradient is not None
        assert relative_error(gradient, data[f"grad/{key}"]) < 1e-5


def test_shuffle_is_groups_first_to_channels_first() -> None:
    first, second = torch.rand(2, 16, 5, 7), torch.rand(2, 16, 5, 7)
    joined = torch.cat([first, second], dim=1)
    # '(g d) -> (d g)' channel by channel: with 8 groups of 4, channel d * 8 + g comes from g * 4 + d.
    expected = torch.stack([joined[:, g * 4 + d] for d in range(4) for g in range(8)], dim=1)
    for layout in (torch.contiguous_format, torch.channels_last):
        halves = [half.contiguous(memory_format=layout) for half in (first, second)]
        assert torch.equal(concatenate_shuffled(*halves), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_format_does_not_change_values(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    network = ShuffleMixer.preset("tiny", 2)
    lr = torch.rand(2, 3, 9, 12)
    with torch.inference_mode():
        expected = network(lr)
        network.to(memory_format=layout)  # type: ignore[call-overload]
        got = network(lr.contiguous(memory_format=layout))
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": 20}, "features must be a multiple of 8, got 20"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"blocks": 0}, "blocks must be a whole number of at least 1, got 0"),
        ({"mlp_ratio": 1.5}, "mlp_ratio must be a whole number of at least 1, got 1.5"),
        ({"scale": 8}, r"scale must be one of \(2, 3, 4\), got 8"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShuffleMixerConfig(**({"features": 32, "kernel_size": 3} | change))


def test_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="model must be one of tiny, base, got 'huge'"):
        ShuffleMixer.preset("huge", 2)


@pytest.mark.parametrize(
    "config",
    [
        *(ShuffleMixerConfig.preset(name, scale) for name, scale in NETWORKS),
        ShuffleMixerConfig(features=16, kernel_size=5, blocks=2, mlp_ratio=3, scale=3),
    ],
)
def test_shape_is_told_from_the_weights(config: ShuffleMixerConfig) -> None:
    assert infer_config(ShuffleMixer.from_config(config).state_dict()) == config


def small_network() -> ShuffleMixer:
    return ShuffleMixer(features=8, kernel_size=3, blocks=1, mlp_ratio=2, scale=2)


def test_checkpoint_layouts(tmp_path: Path) -> None:
    raw, ema = small_network().state_dict(), small_network().state_dict()
    wrapped = {f"module.{name}": value for name, value in raw.items()}
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"params": raw, "params_ema": ema, "iteration": 5}, "params_ema", "params"),
        ({"params_ema": ema}, "params_ema", "params_ema"),
        ({"params": wrapped}, "params", "params"),
        (dict(raw), "bare", "bare"),
    ]
    for content, by_ema, by_raw in cases:
        path = tmp_path / "weights.pt"
        torch.save(content, path)
        assert load_checkpoint(path).weights_key == by_ema
        assert load_checkpoint(path, prefer="raw").weights_key == by_raw
        weights = load_checkpoint(path).build().state_dict()
        expected = ema if by_ema == "params_ema" else raw
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


class Harmful:
    """Something that a pickle could carry: reading it would call a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (Path("srshards-pickle-was-executed"),)


def test_wrong_files_are_clear_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = small_network().state_dict()
    missing = {name: value for name, value in good.items() if name != "tail.bias"}
    torch.save(good, "whole.pt")
    Path("truncated.pt").write_bytes(Path("whole.pt").read_bytes()[:2000])
    Path("text.pt").write_text("not a checkpoint")
    torch.save({"params": Harmful()}, "harmful.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"params": 3}, "number.pt")
    torch.save({"conv.weight": torch.zeros(1)}, "other.pt")
    torch.save({"params": missing}, "missing.pt")
    torch.save(good | {"extra": torch.zeros(1)}, "extra.pt")
    cases = {
        "absent.pt": "no such file",
        "truncated.pt": "got a damaged file or other content",
        "text.pt": "got a damaged file or other content",
        "harmful.pt": "got a damaged file or other content",
        "list.pt": "expected a mapping of weights, got list",
        "number.pt": "expected weights in params_ema, params or at the top, got keys params",
        "other.pt": "not the weights of a ShuffleMixer; missing or wrong: 'to_feat.weight'",
        "missing.pt": r"tail.bias: expected \(3,\), got nothing",
        "extra.pt": r"extra: expected no such name, got \(1,\)",
    }
    for name, message in cases.items():
        with pytest.raises(CheckpointError, match=f"^{name}.*{message}"):
            load_checkpoint(Path(name)).build()
    assert not Path("srshards-pickle-was-executed").exists()


def test_presets_are_the_published_shapes() -> None:
    shapes = {name: (c.features, c.kernel_size, c.blocks, c.mlp_ratio) for name, c in PRESETS.items()}
    assert shapes == {"tiny": (32, 3, 5, 2), "base": (64, 7, 5, 2)}
