"""ShuffleMixer, the published super-resolution network.

Source: Sun, Pan, Tang, "ShuffleMixer: An Efficient ConvNet for Image Super-Resolution", NeurIPS 2022.
Parameters carry the published names, the misspelt `upsapling` included, so that weights travel both ways.
Everything runs channels-last: norm and shuffle then work on views, where NCHW would rearrange the pixels. The modules
say what is computed, by plain torch operations, and any of them may be replaced by one of the same shapes. On the CPU
the compiled kernel of `model.cpu` stands in for those that are as they were made: `model.cpu.eligibility` decides.
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
    """Norm and MLP, depth-wise convolution, norm and MLP; the MLPs with skips."""

    def __init__(self, config: ShuffleMixerConfig) -> None:
        super().__init__()
        self.config = config
        self.norm1 = make_norm(config)
        self.norm2 = make_norm(config)
        self.spatial = make_depthwise(config)
        self.mlp1 = PointMlp(config)
        self.mlp2 = PointMlp(config)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Give a tensor of x's shape, with `skip` added if there is one."""
        x = MIX(self.config, (self.norm1, self.mlp1), x)
        x = DEPTHWISE(self.config, (self.spatial,), x)
        return MIX(self.config, (self.norm2, self.mlp2), x, skip)

    def kernel_parts(self) -> list[tuple[KernelPart, ShuffleMixerConfig, Modules]]:
        """What the compiled kernel may compute here, if the modules are as they were made."""
        mixes = [(self.norm1, self.mlp1), (self.norm2, self.mlp2)]
        return [(DEPTHWISE, self.config, (self.spatial,)), *((MIX, self.config, modules) for modules in mixes)]


class FeatureMixingBlock(nn.Module):
    """Two shuffle-mixer layers, then a fused 3x3 and 1x1 convolution; a skip around each part."""

    def __init__(self, config: ShuffleMixerConfig) -> None:
        super().__init__()
        self.config = config
        self.net = nn.Sequential(ShuffleMixerLayer(config), ShuffleMixerLayer(config))
        self.fused = config.fused
        if self.fused:
            self.conv = make_conv(config)

    def forward(self, x: Tensor) -> Tensor:
        """Give a tensor of x's shape."""
        x = self.layers(x)
        return PROJECT(self.config, (self.conv,), x) if self.fused else x

    def layers(self, x: Tensor) -> Tensor:
        """Give net(x) + x; if the last layer is of ours, it adds x itself, in the same pass over memory."""
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
        """What the compiled kernel may compute here, if the modules are as they were made."""
        return [(PROJECT, self.config, (self.conv,))] if self.fused else []


SEQUENTIAL = ModuleSpec.of(nn.Sequential())


@cache
def layer_spec(config: ShuffleMixerConfig) -> ModuleSpec:
    """Describe a layer as it is made."""
    with torch.device("meta"):
        return ModuleSpec.of(ShuffleMixerLayer(config))


class ShuffleMixer(nn.Module):
    """The network: LR RGB in [0, 1], float (N, 3, H, W), to HR RGB, float (N, 3, H·scale, W·scale).

    The output is not clamped. `config` holds the shape, given here as the fields of `ShuffleMixerConfig`.
    `activation_checkpointing`, set to True, has training keep each block's input only, and compute the block again
    in the backward pass: the same gradients bit for bit, for less memory and more time.

    Any module may be replaced by one of the same shapes, wrapped, hooked or parametrized: what the code says is what
    runs. On the CPU, float32 passes use a compiled kernel for the parts that are as they were made; `model.cpu.reasons`
    says which are not, and `SRSHARDS_KERNELS=0` has all of them run as plain operations.
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
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            # Called block by block, hooks on the sequence itself would not run.
            whole = global_hooks() or SEQUENTIAL.mismatch(self.blocks, recursive=False)
            for block in [self.blocks] if whole else self.blocks:
                x = checkpoint(block, x, use_reentrant=False)  # generators' states are kept: for dropout, if there is
        else:
            x = self.blocks(x)
        enlarged = F.interpolate(lr, scale_factor=self.config.scale, mode="bilinear", align_corners=False)
        return self.upsample(x) + enlarged

    def upsample(self, x: Tensor) -> Tensor:
        """Features (N, C, H, W) to RGB (N, 3, H·scale, W·scale)."""
        return ENLARGE(self.config, (self.upsapling, self.tail), x)

    def kernel_parts(self) -> list[tuple[KernelPart, ShuffleMixerConfig, Modules]]:
        """What the compiled kernel may compute here, if the modules are as they were made."""
        return [(ENLARGE, self.config, (self.upsapling, self.tail))]

    def parameter_count(self) -> int:
        """Count the trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def multiply_accumulates(self, height: int = 720, width: int = 1280) -> int:
        """Count the multiply-accumulates that make one HR image of `height` x `width` pixels, the LR size rounded up.

        Counted as the paper's table is: convolutions (and matrix products) without their biases, and 4 for each value
        that the bilinear enlargement makes; norms and activations count nothing. Whatever the modules now are, the
        operations are counted in a forward pass on the meta device, which computes no values.
        """
        from torch.utils.flop_counter import FlopCounterMode

        scale = self.config.scale
        size = -(-height // scale), -(-width // scale)
        state = {name: value.to("meta") for name, value in [*self.named_parameters(), *self.named_buffers()]}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            torch.func.functional_call(self, state, (torch.empty(1, 3, *size, device="meta"),))
        operations: int = counter.get_total_flops()
        return operations // 2 + 4 * 3 * scale**2 * size[0] * size[1]
