"""Tiles of edited networks: what they see is computed from the modules as they are, or said not to be known."""

from __future__ import annotations

from collections.abc import Callable

import click
import pytest
import torch
from networks import small_network
from torch import nn

from model.enlarge import tiles as tiled
from model.enlarge.options import choose_tiling
from model.enlarge.tiles import Tiling, automatic_tiling, by_tiles, receptive_radius
from model.shufflemixer import ShuffleMixer


def dilate(network: ShuffleMixer) -> None:
    network.tail = nn.Conv2d(32, 3, 3, padding=3, dilation=3)


def widen(network: ShuffleMixer) -> None:
    network.tail = nn.Conv2d(32, 3, (1, 5), padding="same", padding_mode="reflect")


def lopsided(network: ShuffleMixer) -> None:
    network.tail = nn.Conv2d(32, 3, 4, padding="same")


def twice(network: ShuffleMixer) -> None:
    (block,) = network.blocks
    network.blocks = nn.Sequential(block, nn.Sequential(block, nn.GELU()))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("edit", "radius"), [(dilate, 7), (widen, 6), (lopsided, 6), (twice, 8)])
def test_radius_of_edited_networks(edit: Callable[[ShuffleMixer], None], radius: int) -> None:
    network = small_network().double().eval()
    assert receptive_radius(network) == 5
    edit(network.float())
    network.double()
    assert receptive_radius(network) == radius
    lr = torch.rand(1, 3, 40, 33, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(by_tiles(network, lr, Tiling(9, radius)), network(lr), rtol=0, atol=1e-9)


class Own(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize(
    "edit",
    [
        lambda network: network.blocks.append(Own()),
        lambda network: network.blocks.append(nn.AdaptiveAvgPool2d(1)),
        lambda network: network.blocks.append(nn.GroupNorm(4, 32)),
        lambda network: network.blocks.append(nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular")),
        lambda network: network.blocks.register_forward_hook(lambda module, inputs, output: output.flip(-1)),
        lambda network: setattr(network.tail, "forward", Own().forward),
    ],
)
def test_where_the_radius_is_unknown_images_stay_whole(
    edit: Callable[[ShuffleMixer], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled, "MEMORY", 1 << 20)
    network = small_network()
    assert automatic_tiling(network, 1000, 1000) is not None
    edit(network)
    assert receptive_radius(network) is None
    assert automatic_tiling(network, 1000, 1000) is None
    assert choose_tiling(network, 64, 9) == Tiling(64, 9)
    with pytest.raises(click.UsageError, match="--tile needs --overlap"):
        choose_tiling(network, 64, None)
