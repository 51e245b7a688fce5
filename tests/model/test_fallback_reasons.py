"""`fallback_reasons` says where the compiled kernel does not run, and why; edited networks count their own costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import kernel_off, needs_mixing_kernel, small_network
from torch import nn
from trainings import command, finish, start

from model.cpu import mixing_kernel
from model.cpu.reasons import fallback_reasons
from model.shufflemixer import FeatureMixingBlock, ShuffleMixer, ShuffleMixerLayer


@needs_mixing_kernel
def test_unedited_networks_have_no_reasons() -> None:
    for name in ("tiny", "base"):
        for scale in (2, 3, 4):
            assert fallback_reasons(ShuffleMixer.preset(name, scale)) == []
    assert fallback_reasons(small_network().to("meta")) == []


@needs_mixing_kernel
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("bf16",), "computes in fp32, not in bf16"),
        (("fp16",), "computes in fp32, not in fp16"),
        (("fp32", True), "--compile leaves the network to torch's compiler"),
    ],
)
def test_reasons_for_the_whole_network(arguments: tuple[Any, ...], reason: str) -> None:
    (line,) = fallback_reasons(small_network(), *arguments)
    assert line.startswith("the network falls back to plain torch operations: ")
    assert line.endswith(reason)


def test_missing_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    with kernel_off():
        monkeypatch.setattr(mixing_kernel, "compiled", lambda name: None)
        assert "the compiled kernel model.cpu._mixing is not built" in fallback_reasons(small_network())[0]
        monkeypatch.setenv("SRSHARDS_KERNELS", "0")
        assert "SRSHARDS_KERNELS=0 switches the compiled kernel off" in fallback_reasons(small_network())[0]


def test_kernel_built_from_another_source_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `git pull` without a rebuild: an older `start` took an address."""

    class Old:
        def start(self, address: int, lanes: int) -> int:
            return lanes + address % 2

    monkeypatch.setattr(mixing_kernel, "compiled", lambda name: Old())
    monkeypatch.setattr(mixing_kernel, "extension", mixing_kernel.start())
    monkeypatch.delenv("SRSHARDS_KERNELS", raising=False)
    assert mixing_kernel.extension is None
    assert "to be built from this source" in mixing_kernel.why_missing()


@needs_mixing_kernel
def test_reasons_for_parts() -> None:
    network = small_network(blocks=2)
    for block in network.blocks:
        assert isinstance(block, FeatureMixingBlock)
        layer = block.net[1]
        assert isinstance(layer, ShuffleMixerLayer)
        layer.mlp2.fc[1] = nn.GELU()
    network.tail.padding_mode = "reflect"
    network.get_submodule("blocks.0.net.0.spatial").register_forward_hook(lambda module, inputs, output: None)
    assert sorted(fallback_reasons(network)) == [
        "falls back to plain torch operations: blocks.0.net.0, depth-wise convolution (spatial: has forward hooks)",
        "falls back to plain torch operations: blocks.0.net.1, mix and 1 more (mlp.fc.1: expected SiLU, got GELU)",
        "falls back to plain torch operations: upsampler (tail: expected padding_mode 'zeros', got 'reflect')",
    ]


@needs_mixing_kernel
def test_reasons_for_configurations() -> None:
    lines = fallback_reasons(ShuffleMixer(32, 9, blocks=1, scale=2, norm=False))
    assert sorted(line.partition("operations: ")[2] for line in lines) == [
        "blocks.0.net.0, depth-wise convolution and 1 more (kernel_size 9; the compiled kernel takes (3, 5, 7))",
        "blocks.0.net.0, mix and 3 more (built without norm; the compiled kernel needs it)",
    ]
    (line,) = {line.partition("(")[2] for line in fallback_reasons(ShuffleMixer(40, 3, blocks=1, scale=2))}
    assert line == "40 features; the compiled kernel takes multiples of 32 up to 2048)"


@needs_mixing_kernel
def test_training_prints_each_reason_once(training_shards: Path, tmp_path: Path) -> None:
    flags = ["--iterations", 2, "--log-every", 1]
    output = finish(start(command(training_shards, tmp_path / "a", *flags, "--precision", "bf16")))[0]
    assert output.count("plain torch operations: the compiled kernel computes in fp32, not in bf16\n") == 1
    output = finish(start(command(training_shards, tmp_path / "b", *flags)))[0]
    assert "plain torch operations" not in output


def test_edited_networks_count_their_own_costs() -> None:
    network = small_network()
    before = network.multiply_accumulates(16, 20)
    pixels = 8 * 10
    network.blocks = nn.Sequential(nn.Identity())
    bare = 27 * 32 + 32 * 128 + 4 * 27 * 32 + 4 * 3 * 4
    assert network.multiply_accumulates(16, 20) == bare * pixels < before
    network.tail = nn.Conv2d(32, 1, 1)
    assert network.multiply_accumulates(16, 20) == (bare - 4 * 27 * 32 + 4 * 32) * pixels
    network.upsapling = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(32, 32, 3, padding=1, groups=32))
    assert network.multiply_accumulates(16, 20) == (27 * 32 + 4 * 9 * 32 + 4 * 32 + 48) * pixels
    network.blocks.append(Linear())
    assert network.multiply_accumulates(16, 20) == (27 * 32 + 4 * 9 * 32 + 4 * 32 + 48 + 32 * 32) * pixels


class Linear(nn.Module):
    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        out: torch.Tensor = self.inner(x.movedim(1, -1)).movedim(-1, 1)
        return out
