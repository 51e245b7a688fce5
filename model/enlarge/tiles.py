"""Enlarging a large image tile by tile, so that memory is bounded, to the values that the whole image would give.

A network of convolutions sees no farther than its radius r: an output pixel depends on the LR pixels at most r away
from its own. So each tile is read with r more pixels on every side (fewer where the image ends, where the network's
own padding belongs), enlarged, and only its inner part kept. Along an axis of n pixels there are k = ⌈n / tile⌉
tiles, about equally large, and tile i keeps the pixels from ⌊i·n / k⌋ to ⌊(i + 1)·n / k⌋.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from model.layers import ChannelNorm, PointMlp
from model.shufflemixer import FeatureMixingBlock, ShuffleMixer, ShuffleMixerLayer

Forward = Callable[[Tensor], Tensor]

# At its peak, a float32 forward pass holds 2.2 to 5.2 times the features at HR size (tiny and base, ×2 to ×4, on the
# CPU without compiled kernels; with them a quarter to a half of that). A tile and its margins stay within MEMORY bytes.
FEATURE_COPIES = 6
MEMORY = 2 << 30
SMALLEST = 64  # pixels along a side of a tile: less would read the margins over and over


@dataclass(frozen=True)
class Tiling:
    """Tiles of at most `tile` x `tile` LR pixels, read with `overlap` more on each side; ValueError if they cannot be.

    An overlap of at least `receptive_radius(network)` gives what the whole image gives, a smaller one seams.
    """

    tile: int
    overlap: int

    def __post_init__(self) -> None:
        if self.tile < 1:
            raise ValueError(f"tile must be at least 1 pixel, got {self.tile}")
        if self.overlap < 0:
            raise ValueError(f"overlap must be at least 0 pixels, got {self.overlap}")


@dataclass(frozen=True)
class Span:
    """One tile along one axis, in LR pixels: `start` to `stop` are kept of those read from `first` to `last`."""

    start: int
    stop: int
    first: int
    last: int


Watch = Callable[[Sequence[tuple[Span, Span]]], Iterable[tuple[Span, Span]]]


def spans(length: int, tiling: Tiling) -> Iterator[Span]:
    """Cut an axis of `length` LR pixels into tiles; what they keep covers it without gap or overlap."""
    count = -(-length // tiling.tile)
    for i in range(count):
        start, stop = i * length // count, (i + 1) * length // count
        yield Span(start, stop, max(0, start - tiling.overlap), min(length, stop + tiling.overlap))


# Modules that look at no other pixel, or leave it to those in them.
LOCAL = (
    *(ShuffleMixer, FeatureMixingBlock, ShuffleMixerLayer, PointMlp, ChannelNorm, nn.Sequential, nn.LayerNorm),
    *(nn.Identity, nn.SiLU, nn.GELU, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.Sigmoid, nn.Tanh, nn.Dropout),
    *(nn.PixelShuffle, nn.RMSNorm),
)
POOLS = (nn.AvgPool2d, nn.MaxPool2d)


def receptive_radius(network: nn.Module) -> int | None:
    """Tell how many LR pixels away the input can matter to an output, at most; None if a module leaves that unknown.

    Each convolution of k x k with dilation d looks d (k // 2) pixels of its own size around it, which are as many LR
    pixels or less, and those one after another add up. Counting all of the network's bounds the longest path, and also
    the bilinear enlargement beside them, which looks at the neighbouring pixel only. 17 for tiny, 37 for base.
    """
    radius = 0
    for module in _uses(network):
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return None
        if isinstance(module, POOLS) and type(module) in POOLS and _both(module.stride) == (1, 1):
            dilation = module.dilation if isinstance(module, nn.MaxPool2d) else 1
            radius += _reach(_both(module.kernel_size), _both(dilation), _both(module.padding))
        elif type(module) is nn.Conv2d and set(module.stride) == {1} and module.padding_mode != "circular":
            radius += _reach(module.kernel_size, module.dilation, _padding(module))
        elif type(module) not in LOCAL:
            return None
    return max(1, radius)


def _uses(module: nn.Module) -> Iterator[nn.Module]:
    """A module and those in it, one that stands in several places as often."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _uses(child)


def _reach(sizes: Sequence[int], dilations: Sequence[int], paddings: Sequence[int]) -> int:
    """Pixels that a window looks to its sides, at most, along either axis."""
    sides = zip(sizes, dilations, paddings, strict=True)
    return max(max(padding, (size - 1) * step - padding) for size, step, padding in sides)


def _both(value: int | tuple[int, int]) -> tuple[int, int]:
    """Along both axes."""
    return value if isinstance(value, tuple) else (value, value)


def _padding(convolution: nn.Conv2d) -> Sequence[int]:
    if not isinstance(convolution.padding, str):
        return convolution.padding
    sides = zip(convolution.kernel_size, convolution.dilation, strict=True)
    return [0 if convolution.padding == "valid" else (side - 1) * step // 2 for side, step in sides]


def automatic_tiling(network: ShuffleMixer, height: int, width: int) -> Tiling | None:
    """Choose tiles for an image of `height` x `width` LR pixels that keep within MEMORY; None: as a whole it does.

    None too for a network of unknown radius, whose tiles would not give what the whole image gives.
    """
    config = network.config
    pixels = MEMORY // (config.features * config.scale**2 * 4 * FEATURE_COPIES)
    if height * width <= pixels:
        return None
    overlap = receptive_radius(network)
    return None if overlap is None else Tiling(max(SMALLEST, math.isqrt(pixels) - 2 * overlap), overlap)


def by_tiles(
    forward: Forward,
    lr: Tensor,
    tiling: Tiling | None,
    finish: Forward = lambda sr: sr,
    watch: Watch = lambda tiles: tiles,
) -> Tensor:
    """Enlarge `lr`, (N, C, H, W), by `forward`, tile by tile or (None) as a whole, and `finish` every part.

    `finish` works on each pixel for itself; where it makes the values small (uint8) or takes them off the device, only
    one tile is ever large, or there. The result has the type and the device that it gives. `watch` is handed the
    tiles and gives them back one after another: a place for a progress bar.
    """
    if tiling is None:
        return finish(forward(lr))
    height, width = lr.shape[-2:]
    whole: Tensor | None = None
    for y, x in watch([*product(spans(height, tiling), spans(width, tiling))]):
        sr = forward(lr[..., y.first : y.last, x.first : x.last])
        scale = sr.shape[-1] // (x.last - x.first)
        rows, columns = (slice((at.start - at.first) * scale, (at.stop - at.first) * scale) for at in (y, x))
        part = finish(sr[..., rows, columns])
        if whole is None:
            size = (*part.shape[:-2], height * scale, width * scale)
            # As the parts are, and pictures: their channels side by side.
            whole = torch.empty(size, dtype=part.dtype, device=part.device, memory_format=torch.channels_last)
        whole[..., y.start * scale : y.stop * scale, x.start * scale : x.stop * scale] = part
    if whole is None:
        raise ValueError(f"expected at least one pixel, got {height} x {width}")
    return whole


def self_ensemble(forward: Forward) -> Forward:
    """Average `forward` over the 8 flips and quarter turns of its input, each undone on its output.

    Source: Lim et al., "Enhanced Deep Residual Networks for Single Image Super-Resolution", 2017, section 3.4.
    """

    def averaged(lr: Tensor) -> Tensor:
        total: Tensor | None = None
        for turns in range(4):
            for mirrored in (False, True):
                view = torch.rot90(lr.flip(-1) if mirrored else lr, turns, (-2, -1))
                sr = torch.rot90(forward(view), -turns, (-2, -1))
                sr = sr.flip(-1) if mirrored else sr
                total = sr if total is None else total + sr
        assert total is not None
        return total / 8

    return averaged
