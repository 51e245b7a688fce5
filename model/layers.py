"""The layers of the network, written in plain torch operations.

Each may be replaced by any module of the same input and output shapes. The compiled kernel replaces only layers that
are exactly as made here; see `model.cpu.eligibility`.
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
        """Normalise every pixel over its channels; the shape stays."""
        normed: Tensor = self.body(x.permute(0, 2, 3, 1))  # in channels-last memory a view, not a copy
        return normed.permute(0, 3, 1, 2)


class PointMlp(nn.Module):
    """A point-wise MLP on the first half of the channels, then a shuffle that mixes both halves.

    Without `split` the MLP works on all channels and nothing is shuffled; without `shuffle` the halves stay in order.
    """

    def __init__(self, config: ShuffleMixerConfig) -> None:
        super().__init__()
        self.split, self.shuffle = config.split, config.shuffle
        width = config.features // 2 if config.split else config.features
        hidden = width * config.mlp_ratio
        self.fc = nn.Sequential(nn.Conv2d(width, hidden, 1), nn.SiLU(), nn.Conv2d(hidden, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of `x`."""
        if not self.split:
            mixed: Tensor = self.fc(x)
            return mixed
        first, second = x.chunk(2, dim=1)
        join = concatenate_shuffled if self.shuffle else concatenate
        return join(self.fc(first), second)


def concatenate(first: Tensor, second: Tensor) -> Tensor:
    """Concatenate two tensors (N, C/2, H, W) along the channels."""
    return torch.cat([first, second], dim=1)


def concatenate_shuffled(first: Tensor, second: Tensor) -> Tensor:
    """Concatenate two tensors (N, C/2, H, W) along the channels, then shuffle these as '(g d) -> (d g)' with g = 8.

    Each half holds whole groups, so grouping is a view and a single copy concatenates. In channels-last memory the
    shuffle permutes only neighbouring values.
    """

    def grouped(half: Tensor) -> Tensor:
        batch, channels, height, width = half.shape
        groups = SHUFFLE_GROUPS // 2
        return half.permute(0, 2, 3, 1).reshape(batch, height, width, groups, channels // groups)

    groups = torch.cat([grouped(first), grouped(second)], dim=3)
    return groups.transpose(3, 4).flatten(3).permute(0, 3, 1, 2)


def make_norm(config: ShuffleMixerConfig) -> nn.Module:
    """Return a norm, or an identity if the configuration has no norm."""
    return ChannelNorm(config.features) if config.norm else nn.Identity()


def make_depthwise(config: ShuffleMixerConfig) -> nn.Conv2d:
    """Return a depth-wise convolution."""
    features, size = config.features, config.kernel_size
    return nn.Conv2d(features, features, size, padding=size // 2, groups=features)


def make_conv(config: ShuffleMixerConfig) -> nn.Sequential:
    """Return the convolutions that follow a pair of layers: 3x3 to more features, SiLU, 1x1 back."""
    features, wide = config.features, config.features + EXTRA_FEATURES
    return nn.Sequential(nn.Conv2d(features, wide, 3, padding=1), nn.SiLU(), nn.Conv2d(wide, features, 1))


def make_upsampler(config: ShuffleMixerConfig) -> nn.Sequential:
    """Return pixel-shuffle upsampling by the scale: in one step, for ×4 in two steps of 2."""
    parts: list[nn.Module] = []
    for factor in (2, 2) if config.scale == 4 else (config.scale,):
        parts += [nn.Conv2d(config.features, config.features * factor**2, 1), nn.PixelShuffle(factor), nn.SiLU()]
    return nn.Sequential(*parts)


def make_tail(config: ShuffleMixerConfig) -> nn.Conv2d:
    """Return the convolution from features to RGB."""
    return nn.Conv2d(config.features, 3, 3, padding=1)
