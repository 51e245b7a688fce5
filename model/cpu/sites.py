"""The computations that the compiled kernel knows: each as modules say it, and by functions of `model.cpu.fused`."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from model.config import ShuffleMixerConfig
from model.cpu import fused
from model.cpu.fusable import Modules, Run, Site
from model.cpu.plainly import busy
from model.parts import ChannelNorm, PointMlp, conv_of, norm_of, spatial_of, tail_of, upsampler_of


def mixed(modules: Modules, x: Tensor, skip: Tensor | None) -> Tensor:
    """Norm and MLP with a skip around both, and one more to add if there is one."""
    norm, mlp = modules
    out: Tensor = mlp(norm(x)) + x
    return out if skip is None else out + skip


def mixed_fast(run: Run, modules: Modules, x: Tensor, skip: Tensor | None) -> Tensor:
    """`mixed`, fused."""
    norm, mlp = cast(ChannelNorm, modules[0]), cast(PointMlp, modules[1])
    widen, _, narrow = members(mlp.fc)
    return run(fused.Mix, x, norm.body.weight, *weights_of(widen), *weights_of(narrow), skip)


def convolved(modules: Modules, x: Tensor, skip: Tensor | None) -> Tensor:
    """The depth-wise convolution."""
    out: Tensor = modules[0](x)
    return out


def convolved_fast(run: Run, modules: Modules, x: Tensor, skip: Tensor | None) -> Tensor:
    """`convolved`, fused."""
    return run(fused.Depthwise, x, *weights_of(modules[0]))


def projected(modules: Modules, x: Tensor, skip: Tensor | None) -> Tensor:
    """The convolutions after a pair of layers, with a skip."""
    out: Tensor = modules[0](x) + x
    return out


def projected_fast(run: Run, modules: Modules, x: Tensor, skip: Tensor | None) -> Tensor:
    """`projected`, fused but for its first convolution."""
    first, _, last = members(modules[0])
    return run(fused.Project, first(x), *weights_of(last), x)


def enlarged(modules: Modules, x: Tensor, skip: Tensor | None) -> Tensor:
    """Features to RGB at the HR size."""
    upsampler, tail = modules
    out: Tensor = tail(upsampler(x))
    return out


def enlarged_fast(run: Run, modules: Modules, x: Tensor, skip: Tensor | None) -> Tensor:
    """`enlarged`, fused."""
    parts = members(modules[0])
    *others, last = [(weights_of(parts[i]), cast(nn.PixelShuffle, parts[i + 1])) for i in range(0, len(parts), 3)]
    for weights, shuffle in others:
        x = run(fused.Enlarge, x, *weights, shuffle.upscale_factor, None, None)
    weights, shuffle = last
    return run(fused.Enlarge, x, *weights, shuffle.upscale_factor, *weights_of(modules[1]))


def members(sequence: nn.Module) -> list[nn.Module]:
    """The modules of a sequence, one that stands twice in it twice."""
    return [cast(nn.Module, member) for member in sequence._modules.values()]


def weights_of(convolution: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias."""
    known = cast(nn.Conv2d, convolution)
    return known.weight, cast(Tensor, known.bias)


def unmixed(config: ShuffleMixerConfig) -> str:
    """Say which part of a mix, as the kernel knows it, a configuration leaves out."""
    missing = [name for name in ("split", "shuffle", "norm") if not getattr(config, name)]
    return f"without {missing[0]}, which the compiled kernel has" if missing else ""


def unconvolved(config: ShuffleMixerConfig) -> str:
    """Say if the depth-wise kernel has another size than the compiled ones."""
    size = config.kernel_size
    return "" if size in fused.KERNEL_SIZES else f"a kernel of {size} × {size}, not of {fused.KERNEL_SIZES}"


MIX = Site(
    "mix", (ChannelNorm, PointMlp), ("norm", "mlp"), lambda config: (norm_of(config), PointMlp(config)), mixed,
    mixed_fast, unmixed, skips=True,
)  # fmt: skip
SPATIAL = Site(
    "depth-wise convolution", (), ("spatial",), lambda config: (spatial_of(config),), convolved, convolved_fast,
    unconvolved,
)  # fmt: skip
PROJECT = Site("block", (), ("conv",), lambda config: (conv_of(config),), projected, projected_fast, lambda config: "")
ENLARGE = Site(
    "upsampler", (), ("upsapling", "tail"), lambda config: (upsampler_of(config), tail_of(config)), enlarged,
    enlarged_fast, lambda config: "",
)  # fmt: skip


def why_plain(network: nn.Module, precision: str = "fp32", compiled: bool = False) -> list[str]:
    """Say where and why the CPU's compiled kernel will not run, a line for each reason; none for a network elsewhere.

    `precision` and `compiled` are what the network is to be run with.
    """
    if any(not weight.is_cpu for weight in network.parameters()):
        return []
    whole = fused.missing() or ("--compile leaves the network to torch's compiler" if compiled else "")
    if not whole and precision != "fp32":
        whole = f"the compiled kernel computes in fp32, not in {precision}"
    if whole := whole or busy():
        return [f"the network runs by torch's plain operations: {whole}"]
    where: dict[str, list[str]] = {}
    for name, module in network.named_modules():
        for site, config, modules in getattr(module, "sites", list)():
            if reason := site.why_not(config, modules):
                where.setdefault(reason, []).append(f"{name}, {site.name}" if name else site.name)
    more = [f" and {len(places) - 1} more" if len(places) > 1 else "" for places in where.values()]
    return [
        f"runs by torch's plain operations: {places[0]}{others} ({reason})"
        for (reason, places), others in zip(where.items(), more, strict=True)
    ]
