"""Receptive fields of published and edited networks."""

from __future__ import annotations

from collections.abc import Callable

import click
import pytest
import torch
from networks import small_network
from torch import nn

from model.enlarge import tile_size
from model.enlarge.options import choose_tiling
from model.enlarge.receptive_field import receptive_radius
from model.enlarge.tile_size import automatic_tiling
from model.enlarge.tiles import Tiling, enlarge_in_tiles
from model.shufflemixer import ShuffleMixer


@pytest.mark.parametrize(("name", "radius"), [("tiny", 17), ("base", 37)])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_radius_of_the_published_networks(name: str, radius: int, scale: int) -> None:
    assert receptive_radius(ShuffleMixer.preset(name, scale)) == radius


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize(("kernel_size", "blocks"), [(3, 1), (3, 2), (7, 1)])
def test_radius_is_exact(scale: int, kernel_size: int, blocks: int) -> None:
    """The gradient of LR pixel (c, c)'s output is nonzero up to the radius, and zero beyond."""
    torch.manual_seed(0)
    net = ShuffleMixer(8, kernel_size, blocks, 2, scale).eval()
    radius = receptive_radius(net)
    assert radius is not None
    centre = radius + 4
    lr = torch.rand(1, 3, 2 * centre + 1, 2 * centre + 1, dtype=torch.float64).requires_grad_()
    inner = slice(centre * scale, (centre + 1) * scale)
    (gradient,) = torch.autograd.grad(net.double()(lr)[..., inner, inner].sum(), lr)
    rows = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
    columns = gradient.abs().sum((0, 1, 2)).nonzero().flatten()
    for seen in (rows, columns):
        assert seen.min() == centre - radius
        assert seen.max() == centre + radius


def dilate(network: ShuffleMixer) -> None:
    network.tail = nn.Conv2d(32, 3, 3, padding=3, dilation=3)


def wide_kernel(network: ShuffleMixer) -> None:
    network.tail = nn.Conv2d(32, 3, (1, 5), padding="same", padding_mode="reflect")


def even_kernel(network: ShuffleMixer) -> None:
    network.tail = nn.Conv2d(32, 3, 4, padding="same")


def share_block(network: ShuffleMixer) -> None:
    (block,) = network.blocks
    network.blocks = nn.Sequential(block, nn.Sequential(block, nn.GELU()))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("edit", "radius"), [(dilate, 7), (wide_kernel, 6), (even_kernel, 6), (share_block, 8)])
def test_radius_of_edited_networks(edit: Callable[[ShuffleMixer], None], radius: int) -> None:
    network = small_network().double().eval()
    assert receptive_radius(network) == 5
    edit(network.float())
    network.double()
    assert receptive_radius(network) == radius
    lr = torch.rand(1, 3, 40, 33, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(enlarge_in_tiles(network, lr, Tiling(9, radius)), network(lr), rtol=0, atol=1e-9)


class SubtractMean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize(
    "edit",
    [
        lambda network: network.blocks.append(SubtractMean()),
        lambda network: network.blocks.append(nn.AdaptiveAvgPool2d(1)),
        lambda network: network.blocks.append(nn.GroupNorm(4, 32)),
        lambda network: network.blocks.append(nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular")),
        lambda network: network.blocks.register_forward_hook(lambda module, inputs, output: output.flip(-1)),
        lambda network: setattr(network.tail, "forward", SubtractMean().forward),
    ],
)
def test_unknown_radius_disables_automatic_tiling(
    edit: Callable[[ShuffleMixer], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_size, "MEMORY_BUDGET", 1 << 20)
    network = small_network()
    assert automatic_tiling(network, 1000, 1000) is not None
    edit(network)
    assert receptive_radius(network) is None
    assert automatic_tiling(network, 1000, 1000) is None
    assert choose_tiling(network, 64, 9) == Tiling(64, 9)
    with pytest.raises(click.UsageError, match="--tile needs --overlap"):
        choose_tiling(network, 64, None)
