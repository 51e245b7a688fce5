"""The rival for training steps: ShuffleMixer in the style of the published code, with the published parameter names.

It uses NCHW throughout, like the published code. The norm moves the channels last and back, the shuffle rearranges the
whole tensor, and both make the copies of an einops-style rearrangement.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import EXTRA_FEATURES, SHUFFLE_GROUPS, ShuffleMixerConfig


class Norm(nn.Module):
    """Layer norm over channels, in the shape (N, H·W, C)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.body = nn.LayerNorm(features, eps=1e-5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W)."""
        batch, features, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(batch, height * width, features)
        normed: Tensor = self.body(rows)
        return normed.reshape(batch, height, width, features).permute(0, 3, 1, 2).contiguous()


class Mlp(nn.Module):
    """1×1 convolutions on the first half of the channels, then the shuffle."""

    def __init__(self, features: int, mlp_ratio: int) -> None:
        super().__init__()
        half = features // 2
        hidden = half * mlp_ratio
        self.fc = nn.Sequential(nn.Conv2d(half, hidden, 1), nn.SiLU(inplace=True), nn.Conv2d(hidden, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of x's shape."""
        first, second = x.chunk(2, dim=1)
        joined = torch.cat([self.fc(first), second], dim=1)
        batch, features, height, width = joined.shape
        grouped = joined.view(batch, SHUFFLE_GROUPS, features // SHUFFLE_GROUPS, height, width)
        return grouped.transpose(1, 2).reshape(batch, features, height, width)


class Layer(nn.Module):
    """Norm and MLP, depth-wise convolution, norm and MLP."""

    def __init__(self, features: int, kernel_size: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = Norm(features)
        self.norm2 = Norm(features)
        self.spatial = nn.Conv2d(features, features, kernel_size, padding=kernel_size // 2, groups=features)
        self.mlp1 = Mlp(features, mlp_ratio)
        self.mlp2 = Mlp(features, mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of x's shape."""
        x = self.mlp1(self.norm1(x)) + x
        x = self.spatial(x)
        mixed: Tensor = self.mlp2(self.norm2(x)) + x
        return mixed


class Block(nn.Module):
    """Two layers and the fused convolution, with skips."""

    def __init__(self, features: int, kernel_size: int, mlp_ratio: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(Layer(features, kernel_size, mlp_ratio) for _ in range(2)))
        wide = features + EXTRA_FEATURES
        self.conv = nn.Sequential(
            nn.Conv2d(features, wide, 3, padding=1), nn.SiLU(inplace=True), nn.Conv2d(wide, features, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of x's shape."""
        x = self.net(x) + x
        fused: Tensor = self.conv(x) + x
        return fused


class PublishedStyle(nn.Module):
    """The network of `config`, with all its parts."""

    def __init__(self, config: ShuffleMixerConfig) -> None:
        super().__init__()
        features, kernel_size, mlp_ratio, scale = config.features, config.kernel_size, config.mlp_ratio, config.scale
        self.scale = scale
        self.to_feat = nn.Conv2d(3, features, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*(Block(features, kernel_size, mlp_ratio) for _ in range(config.blocks)))
        upsampler: list[nn.Module] = []
        for factor in (2, 2) if scale == 4 else (scale,):
            upsampler += [nn.Conv2d(features, features * factor**2, 1), nn.PixelShuffle(factor), nn.SiLU(inplace=True)]
        self.upsapling = nn.Sequential(*upsampler)
        self.tail = nn.Conv2d(features, 3, 3, padding=1)

    def forward(self, lr: Tensor) -> Tensor:
        """Enlarge `lr`, float (N, 3, H, W)."""
        features = self.upsapling(self.blocks(self.to_feat(lr)))
        hr: Tensor = self.tail(features)
        return hr + F.interpolate(lr, scale_factor=self.scale, mode="bilinear", align_corners=False)
