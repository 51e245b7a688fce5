"""ShuffleMixer, the published super-resolution network.

Source: Sun, Pan, Tang, "ShuffleMixer: An Efficient ConvNet for Image Super-Resolution", NeurIPS 2022.
Parameters carry the published names, the misspelt `upsapling` included, so that weights travel both ways.
Everything runs channels-last: norm and shuffle then work on views, where NCHW would rearrange the pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALES = (2, 3, 4)
SHUFFLE_GROUPS = 8
EXTRA_FEATURES = 16  # the fused block's 3x3 convolution widens by this much


@dataclass(frozen=True)
class ShuffleMixerConfig:
    """The shape of a network.

    Raises ValueError for features that are no multiple of 8, an even kernel size, a scale other than 2, 3, 4,
    or anything below 1.
    """

    features: int
    kernel_size: int
    blocks: int = 5
    mlp_ratio: int = 2
    scale: int = 4

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} must be a whole number of at least 1, got {value!r}")
        if self.features % SHUFFLE_GROUPS:
            raise ValueError(f"features must be a multiple of {SHUFFLE_GROUPS}, got {self.features}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        if self.scale not in SCALES:
            raise ValueError(f"scale must be one of {SCALES}, got {self.scale}")

    @staticmethod
    def preset(name: str, scale: int) -> ShuffleMixerConfig:
        """Give the published network `name` ("tiny" or "base") at `scale`; ValueError for another name."""
        if name not in PRESETS:
            raise ValueError(f"model must be one of {', '.join(PRESETS)}, got {name!r}")
        return dataclasses.replace(PRESETS[name], scale=scale)


PRESETS: Mapping[str, ShuffleMixerConfig] = {
    "tiny": ShuffleMixerConfig(features=32, kernel_size=3),
    "base": ShuffleMixerConfig(features=64, kernel_size=7),
}


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (N, C, H, W), with a weight and no bias."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.body = nn.LayerNorm(features, eps=1e-5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every pixel over its channels; same shape."""
        normed: Tensor = self.body(x.permute(0, 2, 3, 1))  # for channels-last memory a view, not a copy
        return normed.permute(0, 3, 1, 2)


class SplitPointMlp(nn.Module):
    """A point-wise MLP on the first half of the channels, then a shuffle that mixes both halves."""

    def __init__(self, features: int, mlp_ratio: int) -> None:
        super().__init__()
        half = features // 2
        hidden = half * mlp_ratio
        self.fc = nn.Sequential(nn.Conv2d(half, hidden, 1), nn.SiLU(), nn.Conv2d(hidden, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Give a tensor of x's shape."""
        first, second = x.chunk(2, dim=1)
        return concatenate_shuffled(self.fc(first), second)


def concatenate_shuffled(first: Tensor, second: Tensor) -> Tensor:
    """Concatenate two (N, C/2, H, W) along the channels and shuffle these as '(g d) -> (d g)' with g = 8.

    Each half holds whole groups, so the grouping is a view of each and one concatenation makes the grouped
    tensor; in channels-last order the shuffle permutes only the innermost, neighbouring values.
    """

    def grouped(half: Tensor) -> Tensor:
        batch, channels, height, width = half.shape
        groups = SHUFFLE_GROUPS // 2
        return half.permute(0, 2, 3, 1).view(batch, height, width, groups, channels // groups)

    groups = torch.cat([grouped(first), grouped(second)], dim=3)
    return groups.transpose(3, 4).flatten(3).permute(0, 3, 1, 2)


class ShuffleMixerLayer(nn.Module):
    """Norm and MLP, depth-wise convolution, norm and MLP; the MLPs with skips."""

    def __init__(self, features: int, kernel_size: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(features)
        self.norm2 = ChannelNorm(features)
        self.spatial = nn.Conv2d(features, features, kernel_size, padding=kernel_size // 2, groups=features)
        self.mlp1 = SplitPointMlp(features, mlp_ratio)
        self.mlp2 = SplitPointMlp(features, mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Give a tensor of x's shape."""
        x = self.spatial(self.mlp1(self.norm1(x)) + x)
        mixed: Tensor = self.mlp2(self.norm2(x)) + x
        return mixed


class FeatureMixingBlock(nn.Module):
    """Two shuffle-mixer layers, then a fused 3x3 and 1x1 convolution; a skip around each part."""

    def __init__(self, features: int, kernel_size: int, mlp_ratio: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            ShuffleMixerLayer(features, kernel_size, mlp_ratio),
            ShuffleMixerLayer(features, kernel_size, mlp_ratio),
        )
        wide = features + EXTRA_FEATURES
        self.conv = nn.Sequential(nn.Conv2d(features, wide, 3, padding=1), nn.SiLU(), nn.Conv2d(wide, features, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Give a tensor of x's shape."""
        x = self.net(x) + x
        fused: Tensor = self.conv(x) + x
        return fused


class ShuffleMixer(nn.Module):
    """The network: LR RGB in [0, 1], float (N, 3, H, W), to HR RGB, float (N, 3, H·scale, W·scale).

    The output is not clamped. `config` holds the shape; `ShuffleMixerConfig` says which shapes are refused.
    """

    def __init__(self, features: int, kernel_size: int, blocks: int, mlp_ratio: int, scale: int) -> None:
        super().__init__()
        self.config = ShuffleMixerConfig(features, kernel_size, blocks, mlp_ratio, scale)
        self.to_feat = nn.Conv2d(3, features, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*(FeatureMixingBlock(features, kernel_size, mlp_ratio) for _ in range(blocks)))
        upsampler: list[nn.Module] = []
        for factor in (2, 2) if scale == 4 else (scale,):
            upsampler += [nn.Conv2d(features, features * factor**2, 1), nn.PixelShuffle(factor), nn.SiLU()]
        self.upsapling = nn.Sequential(*upsampler)
        self.tail = nn.Conv2d(features, 3, 3, padding=1)

    @classmethod
    def from_config(cls, config: ShuffleMixerConfig) -> ShuffleMixer:
        """Build the network that `config` describes, with random weights."""
        return cls(config.features, config.kernel_size, config.blocks, config.mlp_ratio, config.scale)

    @classmethod
    def preset(cls, name: str, scale: int) -> ShuffleMixer:
        """Build the published network `name` ("tiny" or "base"), with random weights."""
        return cls.from_config(ShuffleMixerConfig.preset(name, scale))

    def forward(self, lr: Tensor) -> Tensor:
        """Enlarge `lr`; shapes as in the class's description."""
        lr = lr.contiguous(memory_format=torch.channels_last)
        features = self.upsapling(self.blocks(self.to_feat(lr)))
        enlarged = F.interpolate(lr, scale_factor=self.config.scale, mode="bilinear", align_corners=False)
        hr: Tensor = self.tail(features) + enlarged
        return hr

    def parameter_count(self) -> int:
        """Count the trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def multiply_accumulates(self, height: int = 720, width: int = 1280) -> int:
        """Count the multiply-accumulates that make one HR image of `height` x `width` pixels.

        Counted as the paper's table is: convolutions without their biases, and 4 for each value that the
        bilinear enlargement makes; norms and activations count nothing. The LR size is rounded up.
        """
        scale = self.config.scale
        lr_pixels = -(-height // scale) * -(-width // scale)
        total = 4 * 3 * scale**2 * lr_pixels
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                enlarged = {"upsapling.3": 2, "tail": scale}.get(name, 1)
                total += module.weight.numel() * enlarged**2 * lr_pixels
        return total
