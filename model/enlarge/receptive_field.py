"""The receptive field of a network, computed from its modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from model.layers import ChannelNorm, PointMlp
from model.shufflemixer import FeatureMixingBlock, ShuffleMixer, ShuffleMixerLayer

# Modules that work on each pixel alone, or only call the modules they contain.
LOCAL = (
    *(ShuffleMixer, FeatureMixingBlock, ShuffleMixerLayer, PointMlp, ChannelNorm, nn.Sequential, nn.LayerNorm),
    *(nn.Identity, nn.SiLU, nn.GELU, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.Sigmoid, nn.Tanh, nn.Dropout),
    *(nn.PixelShuffle, nn.RMSNorm),
)
POOLS = (nn.AvgPool2d, nn.MaxPool2d)


def receptive_radius(network: nn.Module) -> int | None:
    """Return an upper bound on the distance, in LR pixels, from an output to the inputs it depends on.

    Return None if it contains a module whose reach is unknown. A k x k convolution with dilation d reaches d (k // 2)
    pixels, at its own resolution; these are as many LR pixels or fewer. The sum over all convolutions bounds the
    longest path. It also covers the bilinear skip, which reaches 1 pixel. 17 for tiny, 37 for base.
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
    """Yield a module and its descendants, shared ones once per use."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _uses(child)


def _reach(sizes: Sequence[int], dilations: Sequence[int], paddings: Sequence[int]) -> int:
    """Return the largest distance, in pixels along either axis, from an output to the inputs in its window."""
    sides = zip(sizes, dilations, paddings, strict=True)
    return max(max(padding, (size - 1) * step - padding) for size, step, padding in sides)


def _both(value: int | tuple[int, int]) -> tuple[int, int]:
    """Return a value for each axis."""
    return value if isinstance(value, tuple) else (value, value)


def _padding(convolution: nn.Conv2d) -> Sequence[int]:
    if not isinstance(convolution.padding, str):
        return convolution.padding
    sides = zip(convolution.kernel_size, convolution.dilation, strict=True)
    return [0 if convolution.padding == "valid" else (side - 1) * step // 2 for side, step in sides]
