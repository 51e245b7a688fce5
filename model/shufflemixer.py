"""ShuffleMixer, the published super-resolution network.

Source: Sun, Pan, Tang, "ShuffleMixer: An Efficient ConvNet for Image Super-Resolution", NeurIPS 2022.
Parameters carry the published names, the misspelt `upsapling` included, so that weights travel both ways.
Everything runs channels-last: norm and shuffle then work on views, where NCHW would rearrange the pixels. The modules
say what is computed, by plain torch operations; `model.fused` does the same, faster, where it can.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import fused

SCALES = (2, 3, 4)
SHUFFLE_GROUPS = 8
SWITCHES = ("shuffle", "split", "fused", "norm")
EXTRA_FEATURES = 16  # the fused block's 3x3 convolution widens by this much


@dataclass(frozen=True)
class ShuffleMixerConfig:
    """The shape of a network, and which of the published parts it has: all of them, unless for an ablation.

    Raises ValueError for features that are no multiple of 8, an even kernel size, a scale other than 2, 3, 4,
    any number below 1, or a switch that is no bool.
    """

    features: int
    kernel_size: int
    blocks: int = 5
    mlp_ratio: int = 2
    scale: int = 4
    shuffle: bool = True  # channel shuffle after each split MLP; without effect where split is False
    split: bool = True  # MLPs on half of the channels; False: on all, features * mlp_ratio wide inside, no shuffle
    fused: bool = True  # the 3x3 convolution after each pair of layers; False: left out, with its skip
    norm: bool = True  # layer norm before each MLP; False: none

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in SWITCHES:
                if not isinstance(value, bool):
                    raise ValueError(f"{field.name} must be true or false, got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} must be a whole number of at least 1, got {value!r}")
        if self.features % SHUFFLE_GROUPS:
            raise ValueError(f"features must be a multiple of {SHUFFLE_GROUPS}, got {self.features}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        if self.scale not in SCALES:
            raise ValueError(f"scale must be one of {SCALES}, got {self.scale}")

    @staticmethod
    def preset(name: str, scale: int, **changes: Any) -> ShuffleMixerConfig:
        """Give the published network `name` ("tiny" or "base") at `scale`, with `changes` of other fields.

        Raises ValueError for another name or impossible changes.
        """
        if name not in PRESETS:
            raise ValueError(f"model must be one of {', '.join(PRESETS)}, got {name!r}")
        return dataclasses.replace(PRESETS[name], scale=scale, **changes)


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
        return half.permute(0, 2, 3, 1).view(batch, height, width, groups, channels // groups)

    groups = torch.cat([grouped(first), grouped(second)], dim=3)
    return groups.transpose(3, 4).flatten(3).permute(0, 3, 1, 2)


class ShuffleMixerLayer(nn.Module):
    """Norm and MLP, depth-wise convolution, norm and MLP; the MLPs with skips."""

    def __init__(self, config: ShuffleMixerConfig) -> None:
        super().__init__()
        features, kernel_size = config.features, config.kernel_size
        self.norm1 = ChannelNorm(features) if config.norm else nn.Identity()
        self.norm2 = ChannelNorm(features) if config.norm else nn.Identity()
        self.spatial = nn.Conv2d(features, features, kernel_size, padding=kernel_size // 2, groups=features)
        self.mlp1 = PointMlp(config)
        self.mlp2 = PointMlp(config)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Give a tensor of x's shape, with `skip` added if there is one."""
        x = mix(self.norm1, self.mlp1, x)
        if self.spatial.kernel_size[0] in fused.KERNEL_SIZES and fused.usable(x):
            x = fused.depthwise(x, weights_of(self.spatial))
        else:
            x = self.spatial(x)
        return mix(self.norm2, self.mlp2, x, skip)


def mix(norm: nn.Module, mlp: PointMlp, x: Tensor, skip: Tensor | None = None) -> Tensor:
    """Give mlp(norm(x)) + x, and + `skip` if there is one."""
    if isinstance(norm, ChannelNorm) and mlp.split and mlp.shuffle and fused.usable(x):
        return fused.mix(x, norm.body.weight, weights_of(mlp.fc[0]), weights_of(mlp.fc[2]), skip)
    mixed: Tensor = mlp(norm(x)) + x
    return mixed if skip is None else mixed + skip


def weights_of(convolution: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias."""
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.bias is not None
    return convolution.weight, convolution.bias


class FeatureMixingBlock(nn.Module):
    """Two shuffle-mixer layers, then a fused 3x3 and 1x1 convolution; a skip around each part."""

    def __init__(self, config: ShuffleMixerConfig) -> None:
        super().__init__()
        self.net = nn.Sequential(ShuffleMixerLayer(config), ShuffleMixerLayer(config))
        self.fused = config.fused
        if self.fused:
            features, wide = config.features, config.features + EXTRA_FEATURES
            self.conv = nn.Sequential(nn.Conv2d(features, wide, 3, padding=1), nn.SiLU(), nn.Conv2d(wide, features, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Give a tensor of x's shape."""
        first, second = self.net
        x = second(first(x), skip=x)
        if not self.fused:
            return x
        if fused.usable(x):
            return fused.project(self.conv[0](x), weights_of(self.conv[2]), skip=x)
        convolved: Tensor = self.conv(x) + x
        return convolved


class ShuffleMixer(nn.Module):
    """The network: LR RGB in [0, 1], float (N, 3, H, W), to HR RGB, float (N, 3, H·scale, W·scale).

    The output is not clamped. `config` holds the shape, given here as the fields of `ShuffleMixerConfig`.
    `activation_checkpointing`, set to True, has training keep each block's input only, and compute the block again
    in the backward pass: the same gradients bit for bit, for less memory and more time.

    On the CPU, float32 passes go through `model.fused` where they can, past the modules inside layers, whose hooks are
    not called then; `SRSHARDS_KERNELS=0` makes them plain.
    """

    def __init__(
        self, features: int, kernel_size: int, blocks: int = 5, mlp_ratio: int = 2, scale: int = 4, **switches: bool
    ) -> None:
        super().__init__()
        self.config = config = ShuffleMixerConfig(features, kernel_size, blocks, mlp_ratio, scale, **switches)
        self.activation_checkpointing = False
        self.to_feat = nn.Conv2d(3, features, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*(FeatureMixingBlock(config) for _ in range(blocks)))
        upsampler: list[nn.Module] = []
        for factor in (2, 2) if scale == 4 else (scale,):
            upsampler += [nn.Conv2d(features, features * factor**2, 1), nn.PixelShuffle(factor), nn.SiLU()]
        self.upsapling = nn.Sequential(*upsampler)
        self.tail = nn.Conv2d(features, 3, 3, padding=1)

    @classmethod
    def from_config(cls, config: ShuffleMixerConfig) -> ShuffleMixer:
        """Build the network that `config` describes, with random weights."""
        return cls(**dataclasses.asdict(config))

    @classmethod
    def preset(cls, name: str, scale: int, **changes: Any) -> ShuffleMixer:
        """Build the network that `ShuffleMixerConfig.preset` gives, with random weights."""
        return cls.from_config(ShuffleMixerConfig.preset(name, scale, **changes))

    def forward(self, lr: Tensor) -> Tensor:
        """Enlarge `lr`; shapes as in the class's description."""
        lr = lr.contiguous(memory_format=torch.channels_last)
        x = self.to_feat(lr)
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            # Nothing is random in a block: there is no state of generators to keep.
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if recompute else block(x)
        enlarged = F.interpolate(lr, scale_factor=self.config.scale, mode="bilinear", align_corners=False)
        return self.upsample(x) + enlarged

    def upsample(self, x: Tensor) -> Tensor:
        """Features (N, C, H, W) to RGB (N, 3, H·scale, W·scale)."""
        if not fused.usable(x):
            rgb: Tensor = self.tail(self.upsapling(x))
            return rgb
        if self.config.scale == 4:
            x = fused.enlarge(x, weights_of(self.upsapling[0]), 2)
        factor = 2 if self.config.scale == 4 else self.config.scale
        return fused.enlarge(x, weights_of(self.upsapling[-3]), factor, weights_of(self.tail))

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
