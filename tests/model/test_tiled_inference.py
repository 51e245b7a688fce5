"""Tiled inference equals inference on the whole image; so does a self-ensemble in tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from model.enlarge import tile_size
from model.enlarge.receptive_field import receptive_radius
from model.enlarge.self_ensemble import self_ensembled
from model.enlarge.tile_size import automatic_tiling
from model.enlarge.tiles import Tiling, cut_axis, enlarge_in_tiles
from model.shufflemixer import ShuffleMixer, ShuffleMixerConfig


def network(kernel_size: int = 3, blocks: int = 2, scale: int = 2) -> ShuffleMixer:
    torch.manual_seed(0)
    return ShuffleMixer(8, kernel_size, blocks, 2, scale).eval()


def radius_of(net: torch.nn.Module) -> int:
    radius = receptive_radius(net)
    assert radius is not None
    return radius


def image(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.rand((batch, 3, height, width), generator=torch.Generator().manual_seed(height))


@given(length=st.integers(1, 500), tile=st.integers(1, 200), overlap=st.integers(0, 90))
def test_tiles_cover_an_axis_once(length: int, tile: int, overlap: int) -> None:
    reached = 0
    for span in cut_axis(length, Tiling(tile, overlap)):
        assert span.start == reached
        assert 0 < span.stop - span.start <= tile
        assert span.read_start == max(0, span.start - overlap)
        assert span.read_stop == min(length, span.stop + overlap)
        reached = span.stop
    assert reached == length


@pytest.mark.parametrize(("tile", "overlap", "name"), [(0, 1, "tile"), (-3, 1, "tile"), (8, -1, "overlap")])
def test_invalid_tilings_are_rejected(tile: int, overlap: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        Tiling(tile, overlap)


@pytest.mark.parametrize(("scale", "tile"), [(2, 1 << 20), (2, 8), (3, 23), (4, 40)])
def test_tiles_equal_the_whole(scale: int, tile: int) -> None:
    net = network(7, 1, scale)
    lr = image(61, 45, batch=2)
    with torch.inference_mode():
        whole = net(lr)
        tiles = enlarge_in_tiles(net, lr, Tiling(tile, radius_of(net)))
    assert tiles.shape == whole.shape
    torch.testing.assert_close(tiles, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("switch", ["shuffle", "split", "fused", "norm"])
def test_tiles_equal_the_whole_for_ablated_networks(switch: str) -> None:
    torch.manual_seed(0)
    config = ShuffleMixerConfig(8, 5, 2, 2, 2, **{switch: False})
    net = ShuffleMixer.from_config(config).eval()
    lr = image(50, 41)
    with torch.inference_mode():
        tiles = enlarge_in_tiles(net, lr, Tiling(16, radius_of(net)))
        torch.testing.assert_close(tiles, net(lr), rtol=0, atol=1e-5)


def edit(net: ShuffleMixer, name: str) -> None:
    """Replace a module, as a researcher might."""
    layer: Any = net.get_submodule("blocks.0.net.0")
    match name:
        case "dilated":
            layer.spatial = nn.Conv2d(8, 8, 3, padding=3, dilation=3, groups=8)
        case "even":
            layer.spatial = nn.Conv2d(8, 8, 4, padding="same", groups=8)
        case "wide":
            net.tail = nn.Conv2d(8, 3, (1, 7), padding=(0, 3))
        case _:
            layer.norm1 = nn.AvgPool2d(5, stride=1, padding=2, count_include_pad=True)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("name", ["dilated", "even", "wide", "pooled"])
def test_tiles_equal_the_whole_for_edited_networks(name: str) -> None:
    net = network(3, 1)
    edit(net, name)
    lr = image(50, 41)
    radius = receptive_radius(net)
    assert radius is not None
    with torch.inference_mode():
        tiles = enlarge_in_tiles(net, lr, Tiling(16, radius))
        torch.testing.assert_close(tiles, net(lr), rtol=0, atol=1e-5)


def test_too_small_an_overlap_leaves_seams() -> None:
    net = network(7, 1)
    lr = image(40, 40)
    with torch.inference_mode():
        assert (enlarge_in_tiles(net, lr, Tiling(16, 2)) - net(lr)).abs().max() > 1e-4


def test_tiles_are_finished_one_by_one() -> None:
    seen = []

    def finish(sr: Tensor) -> Tensor:
        seen.append(tuple(sr.shape))
        return (sr * 255).clamp(0, 255).byte()

    net = network()
    lr = image(20, 30)
    with torch.inference_mode():
        tiles = enlarge_in_tiles(net, lr, Tiling(10, radius_of(net)), finish)
        expected = finish(net(lr))
    assert seen[:-1] == [(1, 3, 20, 20)] * 6
    assert tiles.dtype == torch.uint8
    assert (tiles.int() - expected.int()).abs().max() <= 1


def test_automatic_tiles_fit_the_memory_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    net = ShuffleMixer.preset("base", 4)
    assert automatic_tiling(net, 256, 256) is None
    large = automatic_tiling(net, 4000, 6000)
    assert large is not None
    assert large.overlap == 37
    side = large.tile + 2 * large.overlap
    assert 0.9 * tile_size.MEMORY_BUDGET < side**2 * 64 * 16 * 4 * tile_size.FEATURE_COPIES <= tile_size.MEMORY_BUDGET
    monkeypatch.setattr(tile_size, "MEMORY_BUDGET", 1 << 20)
    assert automatic_tiling(net, 256, 256) == Tiling(tile_size.MIN_TILE, 37)


def test_self_ensemble_averages_8_transforms() -> None:
    """Adding a position-dependent ramp: the mean over the transforms adds its average."""
    ramp = torch.arange(4.0).reshape(1, 1, 2, 2)

    def forward(lr: Tensor) -> Tensor:
        return lr + ramp

    lr = image(2, 2)
    torch.testing.assert_close(self_ensembled(forward)(lr), lr + ramp.mean())


@pytest.mark.parametrize(
    "transform", [lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.mT, lambda x: torch.rot90(x, 1, (-2, -1))]
)
def test_self_ensemble_commutes_with_every_transform(transform: Callable[[Tensor], Tensor]) -> None:
    net = network(3, 1)
    lr = image(12, 17)
    averaged = self_ensembled(net)
    with torch.inference_mode():
        torch.testing.assert_close(averaged(transform(lr)), transform(averaged(lr)), rtol=0, atol=1e-5)
        assert (averaged(lr) - net(lr)).abs().max() > 1e-3


def test_self_ensemble_in_tiles_equals_the_whole() -> None:
    averaged = self_ensembled(net := network())
    lr = image(33, 50)
    with torch.inference_mode():
        tiles = enlarge_in_tiles(averaged, lr, Tiling(20, radius_of(net)))
        torch.testing.assert_close(tiles, averaged(lr), rtol=0, atol=1e-5)
