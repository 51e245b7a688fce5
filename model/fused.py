"""Fused operations of the network on the CPU: autograd functions around the compiled kernel `_mixing.c`.

Each does what plain torch operations of the network do, named in its docstring, up to rounding. Images are float32
(N, C, H, W) in channels-last memory, C a multiple of 32; nothing between input and output is written to memory or
saved, the backward passes compute it again. `usable` tells where they can be used.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from loader.kernel import compiled

LANES = 16  # of the kernel's longest vectors: matrices have multiples of it as their sides
GROUPS = 8  # of the shuffle
TAIL = 32  # columns of the tail's matrix: 9 taps of 3 colours, rounded up
KERNEL_SIZES = (3, 5, 7)  # of depth-wise convolutions

Weights = tuple[Tensor, Tensor]  # weight and bias of a convolution


def start(lanes: int = LANES) -> Any:
    """The compiled kernel, on torch's own threads and vectors of up to `lanes` floats; None where a part is missing."""
    kernel = compiled("model._mixing")
    if kernel is None:
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        parallel = ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):  # torch was built without OpenMP, or for another system
        return None
    return kernel if kernel.start(parallel, lanes) else None


kernel = start()


def usable(x: Tensor) -> bool:
    """Tell whether `x` and the state of torch allow the fused operations: float32 (N, C, H, W), C in 32s, on the CPU.

    Under autocast and torch.func, and while torch compiles, traces or exports, the plain operations are to be used.
    """
    return (
        kernel is not None
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[1] % (2 * LANES) == 0
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled("cpu")
    )


def mix(x: Tensor, norm: Tensor, widen: Weights, narrow: Weights, skip: Tensor | None) -> Tensor:
    """Give shuffle(cat(MLP(first half of norm(x)), second half of norm(x))) + x, and + `skip` if there is one."""
    return _apply(Mix, x, norm, *widen, *narrow, skip)


def project(inner: Tensor, weights: Weights, skip: Tensor) -> Tensor:
    """Give the 1x1 convolution of SiLU(`inner`), plus `skip`."""
    return _apply(Project, inner, *weights, skip)


def enlarge(x: Tensor, weights: Weights, factor: int, tail: Weights | None = None) -> Tensor:
    """Give SiLU(pixel shuffle(1x1 convolution of x)), or that through the 3x3 convolution `tail` to RGB."""
    return _apply(Enlarge, x, *weights, factor, *(tail or (None, None)))


def depthwise(x: Tensor, weights: Weights) -> Tensor:
    """Give the depth-wise convolution of x with a kernel of a size in `KERNEL_SIZES`, zeros around x."""
    return _apply(Depthwise, x, *weights)


class Mix(torch.autograd.Function):
    """`mix`, as autograd knows it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, widen: Tensor, bias: Tensor, narrow: Tensor, out_bias: Tensor, skip: Any
    ) -> Tensor:
        """Keep the input only."""
        x, out = _dense(x), _new_like(x)
        skip = None if skip is None else _dense(skip)
        ctx.save_for_backward(x, norm, widen, bias, narrow, out_bias)
        ctx.skips = skip is not None
        weights = _mix_weights(norm, widen, bias, narrow, out_bias)
        sizes = (x.numel() // x.shape[1], x.shape[1], len(bias))
        kernel.mix(_at(x), 0, _at(skip), _at(out), _at(weights), 0, *sizes, torch.get_num_threads())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """Compute everything between again."""
        x, norm, widen, bias, narrow, out_bias = ctx.saved_tensors
        slope, d_x = _dense(slope), _new_like(x)
        half, hidden = len(out_bias), len(bias)
        weights = _mix_weights(norm, widen, bias, narrow, out_bias)
        parts = (2 * half, half * hidden, hidden, hidden * half, half)
        sums = x.new_empty(sum(parts))
        sizes = (x.numel() // x.shape[1], 2 * half, hidden)
        kernel.mix(_at(x), _at(slope), 0, _at(d_x), _at(weights), _at(sums), *sizes, torch.get_num_threads())
        d_norm, d_widen, d_bias, d_narrow, d_out_bias = sums.split(parts)
        quarter, groups = half * 2 // GROUPS, GROUPS // 2
        return (
            d_x,
            d_norm,
            d_widen.view(half, hidden).t().reshape(widen.shape),
            d_bias,
            d_narrow.view(hidden, quarter, groups).permute(2, 1, 0).reshape(narrow.shape),
            d_out_bias.view(quarter, groups).t().reshape(half),
            slope if ctx.skips else None,
        )


def _mix_weights(norm: Tensor, widen: Tensor, bias: Tensor, narrow: Tensor, out_bias: Tensor) -> Tensor:
    """All weights as the kernel reads them, the outputs of the MLP in the order in which the shuffle leaves them."""
    hidden, half = widen.shape[:2]
    groups = GROUPS // 2
    first = widen.view(hidden, half)
    second = narrow.view(groups, half // groups, hidden).transpose(0, 1).reshape(half, hidden)
    order = out_bias.view(groups, half // groups).t()
    return _flat(norm, first.t(), bias, second.t(), order, first, second)


class Project(torch.autograd.Function):
    """`project`, as autograd knows it."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor, weight: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
        """Keep the input before its SiLU only."""
        inner, skip, out = _dense(inner), _dense(skip), _new_like(skip)
        ctx.save_for_backward(inner, weight, bias)
        _project(inner, None, skip, out, weight, bias, None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, ...]:
        """Compute the SiLU again."""
        inner, weight, bias = ctx.saved_tensors
        slope, d_inner = _dense(slope), _new_like(inner)
        parts = (weight.numel(), len(bias))
        sums = inner.new_empty(sum(parts))
        _project(inner, slope, None, d_inner, weight, bias, sums)
        d_weight, d_bias = sums.split(parts)
        channels, wide = weight.shape[:2]
        return d_inner, d_weight.view(wide, channels).t().reshape(weight.shape), d_bias, slope


def _project(
    inner: Tensor, slope: Tensor | None, skip: Tensor | None, out: Tensor, weight: Tensor, bias: Tensor, sums: Any
) -> None:
    matrix = weight.view(weight.shape[:2])
    weights = _flat(matrix.t(), bias, matrix)
    sizes = (inner.numel() // inner.shape[1], *weight.shape[:2])
    threads = torch.get_num_threads()
    kernel.project(_at(inner), _at(slope), _at(skip), _at(out), _at(weights), _at(sums), *sizes, threads)


class Enlarge(torch.autograd.Function):
    """`enlarge`, as autograd knows it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, factor: int, tail: Any, tail_bias: Any) -> Tensor:
        """Keep the input only."""
        x = _dense(x)
        images, channels, height, width = x.shape
        ctx.save_for_backward(x, weight, bias, tail, tail_bias)
        ctx.factor = factor
        shape = (images, channels if tail is None else len(tail), height * factor, width * factor)
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        _enlarge(x, None, out, weight, bias, factor, tail, tail_bias, None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """Compute everything between again."""
        x, weight, bias, tail, tail_bias = ctx.saved_tensors
        slope, d_x = _dense(slope), _new_like(x)
        channels, places = x.shape[1], ctx.factor**2
        parts = (weight.numel(), len(bias), 0 if tail is None else channels * TAIL)
        sums = x.new_empty(sum(parts))
        _enlarge(x, slope, d_x, weight, bias, ctx.factor, tail, tail_bias, sums)
        d_weight, d_bias, d_tail = sums.split(parts)
        return (
            d_x,
            d_weight.view(places, channels, channels).transpose(0, 1).reshape(weight.shape),
            d_bias.view(places, channels).t().reshape(bias.shape),
            None,
            None if tail is None else _untangle(d_tail, tail),
            None if tail is None else slope.sum((0, 2, 3)),
        )


def _untangle(d_tail: Tensor, tail: Tensor) -> Tensor:
    colours, channels, height, width = tail.shape
    used = d_tail.view(channels, TAIL)[:, : height * width * colours]
    return used.reshape(channels, height, width, colours).permute(3, 0, 1, 2)


def _enlarge(
    x: Tensor, slope: Any, out: Tensor, weight: Tensor, bias: Tensor, factor: int, tail: Any, tail_bias: Any, sums: Any
) -> None:
    images, channels, height, width = x.shape
    matrices = weight.view(channels, factor**2, channels)  # a pixel shuffle takes places from neighbouring channels
    pieces = [matrices.permute(1, 2, 0), bias.view(channels, factor**2).t(), matrices.transpose(0, 1)]
    if tail is not None:
        taps = tail.permute(1, 2, 3, 0).reshape(channels, math.prod(tail.shape) // channels)
        taps = F.pad(taps, (0, TAIL - taps.shape[1]))
        pieces += [taps, taps.t()]
    weights = _flat(*pieces)
    sizes = (images, height, width, channels, factor, torch.get_num_threads())
    kernel.enlarge(_at(x), _at(slope), _at(tail_bias), _at(out), _at(weights), _at(sums), *sizes)


class Depthwise(torch.autograd.Function):
    """`depthwise`, as autograd knows it: torch's own, but for the gradient of the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Keep the input."""
        x = _dense(x)
        ctx.save_for_backward(x, weight)
        return _dense(F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, ...]:
        """Leave the input's gradient to torch."""
        x, weight = ctx.saved_tensors
        slope = _dense(slope)
        images, channels, height, width = x.shape
        size = weight.shape[-1]
        sums = x.new_empty((size**2 + 1) * channels)
        sizes = (images, height, width, channels, size, torch.get_num_threads())
        kernel.depthwise(_at(x), _at(slope), _at(sums), *sizes)
        pad, one, mask = [size // 2] * 2, [1, 1], [True, False, False]
        d_x = torch.ops.aten.convolution_backward(slope, x, weight, None, one, pad, one, False, [0, 0], channels, mask)[
            0
        ]
        return d_x, sums[:-channels].view(size**2, channels).t().reshape(weight.shape), sums[-channels:]


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _new_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _flat(*pieces: Tensor) -> Tensor:
    return torch.cat([piece.reshape(-1) for piece in pieces])


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
