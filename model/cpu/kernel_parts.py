"""The four parts of the network that the compiled kernel can compute: each by its modules, and by the kernel."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from model.config import ShuffleMixerConfig
from model.cpu.eligibility import KernelPart, Modules, Run
from model.cpu.mixing_kernel import KERNEL_SIZES
from model.cpu.operations import Depthwise, Enlarge, Mix, Project
from model.layers import ChannelNorm, PointMlp, make_conv, make_depthwise, make_norm, make_tail, make_upsampler


def mix_by_modules(modules: Modules, x: Tensor, skip: Tensor | None) -> Tensor:
    """Apply norm and MLP with a skip around both, and add `skip` if given."""
    norm, mlp = modules
    out: Tensor = mlp(norm(x)) + x
    return out if skip is None else out + skip


def mix_by_kernel(run: Run, modules: Modules, x: Tensor, skip: Tensor | None) -> Tensor:
    """Compute `mix_by_modules` as one operation."""
    norm, mlp = cast(ChannelNorm, modules[0]), cast(PointMlp, modules[1])
    widen, _, narrow = children_of(mlp.fc)
    return run(Mix, x, norm.body.weight, *weights_of(widen), *weights_of(narrow), skip)


def depthwise_by_modules(modules: Modules, x: Tensor, skip: Tensor | None) -> Tensor:
    """Apply the depth-wise convolution."""
    out: Tensor = modules[0](x)
    return out


def depthwise_by_kernel(run: Run, modules: Modules, x: Tensor, skip: Tensor | None) -> Tensor:
    """Compute `depthwise_by_modules` as one operation."""
    return run(Depthwise, x, *weights_of(modules[0]))


def project_by_modules(modules: Modules, x: Tensor, skip: Tensor | None) -> Tensor:
    """Apply the convolutions that follow a pair of layers, with a skip."""
    out: Tensor = modules[0](x) + x
    return out


def project_by_kernel(run: Run, modules: Modules, x: Tensor, skip: Tensor | None) -> Tensor:
    """Compute `project_by_modules`: the 3x3 convolution by its module, the rest as one operation."""
    first, _, last = children_of(modules[0])
    return run(Project, first(x), *weights_of(last), x)


def enlarge_by_modules(modules: Modules, x: Tensor, skip: Tensor | None) -> Tensor:
    """Turn features into RGB at HR size."""
    upsampler, tail = modules
    out: Tensor = tail(upsampler(x))
    return out


def enlarge_by_kernel(run: Run, modules: Modules, x: Tensor, skip: Tensor | None) -> Tensor:
    """Compute `enlarge_by_modules` as one operation for each pixel shuffle, the last with the tail."""
    members = children_of(modules[0])
    *others, last = [(weights_of(members[i]), cast(nn.PixelShuffle, members[i + 1])) for i in range(0, len(members), 3)]
    for weights, shuffle in others:
        x = run(Enlarge, x, *weights, shuffle.upscale_factor, None, None)
    weights, shuffle = last
    return run(Enlarge, x, *weights, shuffle.upscale_factor, *weights_of(modules[1]))


def children_of(sequence: nn.Module) -> list[nn.Module]:
    """Return the modules of a sequence; one that occurs twice is listed twice."""
    return [cast(nn.Module, member) for member in sequence._modules.values()]


def weights_of(convolution: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight and bias."""
    known = cast(nn.Conv2d, convolution)
    return known.weight, cast(Tensor, known.bias)


def why_unsupported_mix(config: ShuffleMixerConfig) -> str:
    """Return why the compiled kernel lacks the mix of a configuration; "" if it has it."""
    missing = [name for name in ("split", "shuffle", "norm") if not getattr(config, name)]
    return f"built without {missing[0]}; the compiled kernel needs it" if missing else ""


def why_unsupported_depthwise(config: ShuffleMixerConfig) -> str:
    """Return why the compiled kernel lacks a configuration's kernel size; "" if it has it."""
    size = config.kernel_size
    return "" if size in KERNEL_SIZES else f"kernel_size {size}; the compiled kernel takes {KERNEL_SIZES}"


MIX = KernelPart(
    name="mix",
    own_classes=(ChannelNorm, PointMlp),
    module_names=("norm", "mlp"),
    build=lambda config: (make_norm(config), PointMlp(config)),
    by_modules=mix_by_modules,
    by_kernel=mix_by_kernel,
    why_unsupported=why_unsupported_mix,
    takes_skip=True,
)
DEPTHWISE = KernelPart(
    name="depth-wise convolution",
    own_classes=(),
    module_names=("spatial",),
    build=lambda config: (make_depthwise(config),),
    by_modules=depthwise_by_modules,
    by_kernel=depthwise_by_kernel,
    why_unsupported=why_unsupported_depthwise,
)
PROJECT = KernelPart(
    name="block",
    own_classes=(),
    module_names=("conv",),
    build=lambda config: (make_conv(config),),
    by_modules=project_by_modules,
    by_kernel=project_by_kernel,
    why_unsupported=lambda config: "",
)
ENLARGE = KernelPart(
    name="upsampler",
    own_classes=(),
    module_names=("upsapling", "tail"),
    build=lambda config: (make_upsampler(config), make_tail(config)),
    by_modules=enlarge_by_modules,
    by_kernel=enlarge_by_kernel,
    why_unsupported=lambda config: "",
)
