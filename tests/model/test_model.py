"""The network: published sizes, names and values, ablations, checkpointing, autocast and export."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.layers import concatenate_shuffled
from model.losses import LossConfig, combined
from model.shufflemixer import PRESETS, ShuffleMixer, ShuffleMixerConfig, ShuffleMixerLayer

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
def test_published_parameter_counts_and_macs(name: str, scale: int) -> None:
    network = ShuffleMixer.preset(name, scale)
    assert network.parameter_count() == PARAMETERS[name, scale]
    assert f"{network.multiply_accumulates(720, 1280) / 1e9:.2f}" == GIGA_MACS[name, scale]


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_output_size_for_odd_inputs(scale: int) -> None:
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
    losses = combined(sr, torch.tensor(data["target"]), LossConfig())
    torch.autograd.backward(losses.total)

    assert relative_error(sr, data["output"]) < 1e-5
    assert relative_error(losses.parts["l1"], data["loss_l1"]) < 1e-5
    assert relative_error(losses.parts["fft"], data["loss_fft"]) < 1e-5
    for key in ("to_feat.weight", "tail.weight"):
        gradient = network.get_parameter(key).grad
        assert gradient is not None
        assert relative_error(gradient, data[f"grad/{key}"]) < 1e-5


def test_shuffle_is_groups_first_to_channels_first() -> None:
    first, second = torch.rand(2, 16, 5, 7), torch.rand(2, 16, 5, 7)
    both = torch.cat([first, second], dim=1)
    # '(g d) -> (d g)' channel by channel: with 8 groups of 4, channel d * 8 + g comes from g * 4 + d.
    expected = torch.stack([both[:, g * 4 + d] for d in range(4) for g in range(8)], dim=1)
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
        ({"split": 1}, "split must be true or false, got 1"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShuffleMixerConfig(**({"features": 32, "kernel_size": 3} | change))


def test_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="model must be one of tiny, base, got 'huge'"):
        ShuffleMixer.preset("huge", 2)


def test_presets_are_the_published_networks() -> None:
    shapes = {name: (c.features, c.kernel_size, c.blocks, c.mlp_ratio) for name, c in PRESETS.items()}
    assert shapes == {"tiny": (32, 3, 5, 2), "base": (64, 7, 5, 2)}


ABLATIONS: list[dict[str, Any]] = [
    {"shuffle": False},
    {"split": False},
    {"fused": False},
    {"norm": False},
    {"kernel_size": 7},
    {"shuffle": False, "fused": False, "norm": False},
]


def expected_costs(config: ShuffleMixerConfig) -> tuple[int, int]:
    """Return parameters, and multiply-accumulates per LR pixel, of a ×2 network by hand-derived formulas."""
    features, kernel_size = config.features, config.kernel_size
    width = features // 2 if config.split else features
    mlp = 2 * width * width * config.mlp_ratio
    mlp_biases = width * config.mlp_ratio + width
    wide = features + 16
    layers = 2 * config.blocks
    macs = layers * (2 * mlp + features * kernel_size**2) + 27 * features + 4 * features**2 + 4 * 27 * features
    biases = layers * (2 * mlp_biases + features) + 4 * features + 3
    weights = macs - 3 * 27 * features
    if config.norm:
        biases += layers * 2 * features
    if config.fused:
        convolutions = config.blocks * (9 * features * wide + wide * features)
        macs, weights, biases = macs + convolutions, weights + convolutions, biases + config.blocks * (wide + features)
    return weights + biases, macs + 4 * 3 * 4


@pytest.mark.parametrize("changes", [{}, *ABLATIONS], ids=str)
def test_ablation_costs(changes: dict[str, Any]) -> None:
    network = ShuffleMixer.preset("tiny", 2, **changes)
    parameters, macs = expected_costs(network.config)
    assert network.parameter_count() == parameters
    assert network.multiply_accumulates(20, 30) == macs * 10 * 15


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_ablations_leave_parts_out(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    lr = torch.rand(1, 3, 8, 9)
    network = ShuffleMixer.preset("tiny", 2, **changes)
    sr = network(lr)
    assert sr.shape == (1, 3, 16, 18)
    torch.autograd.backward(sr.sum())
    assert all(parameter.grad is not None for parameter in network.parameters())
    block = network.get_submodule("blocks.0")
    first = block.get_submodule("net.0")
    assert isinstance(first, ShuffleMixerLayer)
    assert hasattr(block, "conv") == network.config.fused
    assert isinstance(first.norm1, torch.nn.Identity) != network.config.norm
    assert first.mlp1.get_parameter("fc.0.weight").shape[1] == (16 if network.config.split else 32)
    x = torch.rand(1, 32, 4, 4)
    if network.config.split:  # the half that bypasses the MLP keeps its place unless shuffled
        assert torch.equal(first.mlp1(x)[:, 16:], x[:, 16:]) != network.config.shuffle


@pytest.mark.parametrize("features", [16, 32])  # without and with the compiled kernel
def test_activation_checkpointing_is_bit_identical(features: int) -> None:
    torch.manual_seed(0)
    network = ShuffleMixer(features, kernel_size=3, blocks=2, scale=2)
    lr = torch.rand(2, 3, 10, 12)
    steps: list[list[Tensor]] = []
    for network.activation_checkpointing in (False, True):
        network.zero_grad()
        sr = network(lr)
        torch.autograd.backward(sr.square().mean())
        steps.append([sr, *(parameter.grad for parameter in network.parameters() if parameter.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))
    network.eval()
    assert torch.equal(network(lr), steps[0][0])


def test_activation_checkpointing_saves_fewer_values() -> None:
    lr = torch.rand(1, 3, 16, 16)
    saved = []
    for checkpointing in (False, True):
        network = ShuffleMixer(16, kernel_size=3, blocks=4, scale=2)
        network.activation_checkpointing = checkpointing
        sizes: list[int] = []

        def pack(value: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(value.numel())
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            network(lr)
        saved.append(sum(sizes))
    assert saved[1] < saved[0] / 2


def test_steps_are_deterministic() -> None:
    torch.manual_seed(0)
    start = ShuffleMixer.preset("tiny", 2)
    lr, hr = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 32, 32)
    ends = []
    for _ in range(2):
        network = copy.deepcopy(start)
        optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
        for _ in range(2):
            optimiser.zero_grad()
            torch.autograd.backward(combined(network(lr), hr, LossConfig()).total)
            optimiser.step()
        ends.append(network.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = ShuffleMixer.preset("tiny", 2)
    lr = torch.rand(1, 3, 12, 12)
    expected = network(lr)
    with torch.autocast("cpu", dtype):
        got = network(lr)
    torch.autograd.backward(got.float().mean())
    assert (got.float() - expected).abs().mean() < 0.05
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())


def test_double_gradients() -> None:
    torch.manual_seed(0)
    network = ShuffleMixer(8, kernel_size=3, blocks=1, mlp_ratio=1, scale=2).double()
    assert torch.autograd.gradcheck(network, torch.rand(1, 3, 3, 4, dtype=torch.float64, requires_grad=True))


def test_exported_network_has_no_kernel_calls() -> None:
    network = ShuffleMixer.preset("tiny", 2).eval()
    lr = torch.rand(1, 3, 8, 8)
    program = torch.export.export(network, (lr,))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert len(calls) > 50
    assert all(call.startswith("aten.") or "getitem" in call for call in calls), calls
    torch.testing.assert_close(program.module()(lr), network(lr), rtol=1e-5, atol=1e-5)
