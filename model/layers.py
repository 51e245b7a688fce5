"""The parts of which the network is made, as plain torch operations say them.

Any of them may be replaced by another module of the same shapes: nothing outside looks into them, but for the compiled
kernel, which `model.cpu.eligibility` keeps to what is as it was made here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import EXTRA_FEATURES, SHUFFLE_GROUPS, ShuffleMixerConfig


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (N, C, H, W), with a weight and no bias."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.body = nn.LayerNorm(features, eps=1e-5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every pixel over its channels; same shape."""
        normed: Tensor = self.body(x.permute(0, 2, 3, 1))  # for channels-last memory a view, not a copy
        return normed.permute(0, 3, 1, 2)


class PointMlp(nn.Module):
    """A point-wise MLP on the first half of the channels, then a shuffle that mixes both halves.

    The configuration may leave out the shuffle, or have the MLP on all channels, with nothing to shuffle.
    """

    def __init__(self, config: ShuffleMixerConfig) -> None:
        super().__init__()
        self.split, self.shuffle = config.split, config.shuffle
        width = config.features // 2 if config.split else config.features
        hidden = width * config.mlp_ratio
        self.fc = nn.Sequential(nn.Conv2d(width, hidden, 1), nn.SiLU(), nn.Conv2d(hidden, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Give a tensor of x's shape."""
        if not self.split:
            mixed: Tensor = self.fc(x)
            return mixed
        first, second = x.chunk(2, dim=1)
        join = concatenate_shuffled if self.shuffle else concatenate
        return join(self.fc(first), second)


def concatenate(first: Tensor, second: Tensor) -> Tensor:
    """Concatenate two (N, C/2, H, W) along the channels."""
    return torch.cat([first, second], dim=1)


def concatenate_shuffled(first: Tensor, second: Tensor) -> Tensor:
    """Concatenate two (N, C/2, H, W) along the channels and shuffle these as '(g d) -> (d g)' with g = 8.

    Each half holds whole groups, so the grouping is a view of each and one concatenation makes the grouped
    tensor; in channels-last order the shuffle permutes only the innermost, neighbouring values.
    """

    def grouped(half: Tensor) -> Tensor:
        batch, channels, height, width = half.shape
        groups = SHUFFLE_GROUPS // 2
        return half.permute(0, 2, 3, 1).reshape(batch, height, width, groups, channels // groups)

    groups = torch.cat([grouped(first), grouped(second)], dim=3)
    return groups.transpose(3, 4).flatten(3).permute(0, 3, 1, 2)


def make_norm(config: ShuffleMixerConfig) -> nn.Module:
    """Make a norm, or what stands where there is none."""
    return ChannelNorm(config.features) if config.norm else nn.Identity()


def make_depthwise(config: ShuffleMixerConfig) -> nn.Conv2d:
    """Make a depth-wise convolution."""
    features, size = config.features, config.kernel_size
    return nn.Conv2d(features, features, size, padding=size // 2, groups=features)


def make_conv(config: ShuffleMixerConfig) -> nn.Sequential:
    """Make the convolutions after a pair of layers."""
    features, wide = config.features, config.features + EXTRA_FEATURES
    return nn.Sequential(nn.Conv2d(features, wide, 3, padding=1), nn.SiLU(), nn.Conv2d(wide, features, 1))


def make_upsampler(config: ShuffleMixerConfig) -> nn.Sequential:
    """Make what enlarges the features, by 2 twice for ×4."""
    parts: list[nn.Module] = []
    for factor in (2, 2) if config.scale == 4 else (config.scale,):
        parts += [nn.Conv2d(config.features, config.features * factor**2, 1), nn.PixelShuffle(factor), nn.SiLU()]
    return nn.Sequential(*parts)


def make_tail(config: ShuffleMixerConfig) -> nn.Conv2d:
    """Make the convolution to RGB."""
    return nn.Conv2d(config.features, 3, 3, padding=1)
