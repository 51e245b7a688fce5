"""ShuffleMixer, the published super-resolution network.

Source: Sun, Pan, Tang, "ShuffleMixer: An Efficient ConvNet for Image Super-Resolution", NeurIPS 2022.
Parameters have the published names, including the misspelt `upsapling`, so published weights load and ours load
elsewhere. Memory is channels-last throughout: norm and shuffle are then views, where NCHW would move pixels. The
modules define what is computed, in plain torch operations, and any of them may be replaced by one of the same shapes.
On the CPU the compiled mixing kernel replaces those that are unedited; `model.cpu.eligibility` decides.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import PRESETS, SCALES, ShuffleMixerConfig
from model.cpu.eligibility import KernelPart, Modules
from model.cpu.kernel_parts import DEPTHWISE, ENLARGE, MIX, PROJECT
from model.cpu.module_spec import ModuleSpec
from model.cpu.torch_state import global_hooks
from model.layers import PointMlp, make_conv, make_depthwise, make_norm, make_tail, make_upsampler

__all__ = [
    "PRESETS", "SCALES", "FeatureMixingBlock", "ShuffleMixer", "ShuffleMixerConfig", "ShuffleMixerLayer",
]  # fmt: skip


class ShuffleMixerLayer(nn.Module):
    """Norm and MLP with a skip, depth-wise convolution, norm and MLP with a skip."""

    def __init__(self, config: ShuffleMixerConfig) -> None:
        super().__init__()
        self.config = config
        self.norm1 = make_norm(config)
        self.norm2 = make_norm(config)
        self.spatial = make_depthwise(config)
        self.mlp1 = PointMlp(config)
        self.mlp2 = PointMlp(config)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Return a tensor of the shape of `x`, with `skip` added if given."""
        x = MIX(self.config, (self.norm1, self.mlp1), x)
        x = DEPTHWISE(self.config, (self.spatial,), x)
        return MIX(self.config, (self.norm2, self.mlp2), x, skip)

    def kernel_parts(self) -> list[tuple[KernelPart, ShuffleMixerConfig, Modules]]:
        """Return the parts that the compiled kernel can compute, if their modules are eligible."""
        mixes = [(self.norm1, self.mlp1), (self.norm2, self.mlp2)]
        return [(DEPTHWISE, self.config, (self.spatial,)), *((MIX, self.config, modules) for modules in mixes)]


class FeatureMixingBlock(nn.Module):
    """Two shuffle-mixer layers with a skip, then a 3x3 and a 1x1 convolution with a skip."""

    def __init__(self, config: ShuffleMixerConfig) -> None:
        super().__init__()
        self.config = config
        self.net = nn.Sequential(ShuffleMixerLayer(config), ShuffleMixerLayer(config))
        self.fused = config.fused
        if self.fused:
            self.conv = make_conv(config)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of `x`."""
        x = self.layers(x)
        return PROJECT(self.config, (self.conv,), x) if self.fused else x

    def layers(self, x: Tensor) -> Tensor:
        """Return net(x) + x; an unedited last layer adds `x` itself, in the same pass over memory."""
        if torch.compiler.is_compiling() or global_hooks() or SEQUENTIAL.mismatch(self.net, recursive=False):
            return self.net(x) + x  # type: ignore[no-any-return]
        *others, last = self.net._modules.values() or [None]
        if last is None or layer_spec(self.config).mismatch(last, recursive=False):
            return self.net(x) + x  # type: ignore[no-any-return]
        inner = x
        for layer in others:
            inner = layer(inner)  # type: ignore[misc]
        return last(inner, skip=x)  # type: ignore[no-any-return]

    def kernel_parts(self) -> list[tuple[KernelPart, ShuffleMixerConfig, Modules]]:
        """Return the parts that the compiled kernel can compute, if their modules are eligible."""
        return [(PROJECT, self.config, (self.conv,))] if self.fused else []


SEQUENTIAL = ModuleSpec.of(nn.Sequential())


@cache
def layer_spec(config: ShuffleMixerConfig) -> ModuleSpec:
    """Return the description of a layer fresh from its constructor."""
    with torch.device("meta"):
        return ModuleSpec.of(ShuffleMixerLayer(config))


class ShuffleMixer(nn.Module):
    """The network, from LR RGB in [0, 1], float (N, 3, H, W), to HR RGB, float (N, 3, H·scale, W·scale), not clamped.

    The constructor takes the fields of `ShuffleMixerConfig`. With `activation_checkpointing` set to True, training
    saves only the input of each block and computes the block again in the backward pass: bit-identical gradients with
    less memory and more time.

    Any module may be replaced by one of the same shapes, wrapped, hooked or parametrized; the edited code is what runs.
    On the CPU, float32 passes use the compiled kernel for unedited parts. `model.cpu.reasons.fallback_reasons` lists
    the others, and `SRSHARDS_KERNELS=0` switches the kernel off.
    """

    def __init__(
        self, features: int, kernel_size: int, blocks: int = 5, mlp_ratio: int = 2, scale: int = 4, **switches: bool
    ) -> None:
        super().__init__()
        self.config = config = ShuffleMixerConfig(features, kernel_size, blocks, mlp_ratio, scale, **switches)
        self.activation_checkpointing = False
        self.to_feat = nn.Conv2d(3, features, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*(FeatureMixingBlock(config) for _ in range(blocks)))
        self.upsapling = make_upsampler(config)
        self.tail = make_tail(config)

    @classmethod
    def from_config(cls, config: ShuffleMixerConfig) -> ShuffleMixer:
        """Return a network of that configuration with random weights."""
        return cls(**dataclasses.asdict(config))

    @classmethod
    def preset(cls, name: str, scale: int, **changes: Any) -> ShuffleMixer:
        """Return a network of `ShuffleMixerConfig.preset(name, scale, **changes)` with random weights."""
        return cls.from_config(ShuffleMixerConfig.preset(name, scale, **changes))

    def forward(self, lr: Tensor) -> Tensor:
        """Enlarge `lr`; shapes as documented for the class."""
        lr = lr.contiguous(memory_format=torch.channels_last)
        x = self.to_feat(lr)
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            # Called block by block, hooks on the sequence itself would not run.
            whole = global_hooks() or SEQUENTIAL.mismatch(self.blocks, recursive=False)
            for block in [self.blocks] if whole else self.blocks:
                x = checkpoint(block, x, use_reentrant=False)  # keeps the random state, for dropout in edited blocks
        else:
            x = self.blocks(x)
        enlarged = F.interpolate(lr, scale_factor=self.config.scale, mode="bilinear", align_corners=False)
        return self.upsample(x) + enlarged

    def upsample(self, x: Tensor) -> Tensor:
        """Turn features (N, C, H, W) into RGB (N, 3, H·scale, W·scale)."""
        return ENLARGE(self.config, (self.upsapling, self.tail), x)

    def kernel_parts(self) -> list[tuple[KernelPart, ShuffleMixerConfig, Modules]]:
        """Return the parts that the compiled kernel can compute, if their modules are eligible."""
        return [(ENLARGE, self.config, (self.upsapling, self.tail))]

    def parameter_count(self) -> int:
        """Return the number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def multiply_accumulates(self, height: int = 720, width: int = 1280) -> int:
        """Return the multiply-accumulates for one HR image of `height` x `width` pixels, the LR size rounded up.

        Counted as in the paper: convolutions and matrix products without biases, and 4 for each value of the bilinear
        interpolation; norms and activations are free. A forward pass on the meta device counts the operations of the
        modules as they are, edited or not.
        """
        from torch.utils.flop_counter import FlopCounterMode

        scale = self.config.scale
        size = -(-height // scale), -(-width // scale)
        state = {name: value.to("meta") for name, value in [*self.named_parameters(), *self.named_buffers()]}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            torch.func.functional_call(self, state, (torch.empty(1, 3, *size, device="meta"),))
        operations: int = counter.get_total_flops()
        return operations // 2 + 4 * 3 * scale**2 * size[0] * size[1]
