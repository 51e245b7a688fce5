"""Fused operations of the network on the CPU: autograd functions around the compiled kernel `_mixing.c`.

Each computes what its `plain` says in torch operations, up to rounding. Images are float32 (N, C, H, W) in
channels-last memory, C a multiple of 32; nothing between input and output is written to memory or saved, the backward
passes compute it again. `why_not` says whether torch's state and an input allow them, `model.cpu.fusable` whether
modules do. Weights' gradients get the strides of the weights.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loader.native import SWITCH, compiled
from model.cpu.plainly import busy, plain_gradients, to_be_plain

LANES = 16  # of the kernel's longest vectors: matrices have multiples of it as their sides
GROUPS = 8  # of the shuffle
TAIL = 32  # columns of the tail's matrix: 9 taps of 3 colours, rounded up
EPS = 1e-5  # of the norm
KERNEL_SIZES = (3, 5, 7)  # of depth-wise convolutions
MOST_CHANNELS = 2048  # the kernel keeps a pixel on the stack
MOST_THREADS = 1024

Gradients = tuple[Tensor | None, ...]


def start(lanes: int = LANES) -> Any:
    """Return the compiled kernel, on torch's own threads and vectors of up to `lanes` floats; None without one."""
    kernel = compiled("model.cpu._mixing")
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return kernel if kernel is not None and kernel.start(str(path), lanes) else None
    except TypeError:  # built from another version of the source
        return None


kernel = start()


def missing() -> str:
    """Say why there is no kernel; "" if there is one."""
    if kernel is not None:
        return ""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 switches the compiled kernel off"
    if compiled("model.cpu._mixing") is None:
        return "the compiled kernel model.cpu._mixing is not built"
    return "the compiled kernel needs a processor with AVX2 and FMA, torch's OpenMP, and to be built from this source"


def why_not(x: Tensor) -> str:
    """Say why the kernel cannot take `x` now; "" for float32 (N, C, H, W), C in 32s, on the CPU, and no mode active."""
    if kernel is None:
        return missing() or "the compiled kernel is switched off"
    if reason := busy():
        return reason
    if type(x) is not Tensor:
        return f"the input is a {type(x).__name__}"
    if not x.is_cpu or x.dtype is not torch.float32 or x.layout is not torch.strided:
        return f"the input is {x.dtype} on {x.device}, not float32 on the CPU"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is enabled"
    if x.dim() != 4 or not x.numel() or x._is_zerotensor():
        return f"the input has shape {tuple(x.shape)} or no memory"
    return why_not_channels(x.shape[1])


def why_not_channels(channels: int) -> str:
    """Say why the kernel cannot work on so many channels; "" if it can."""
    if channels % (2 * LANES) or channels > MOST_CHANNELS:
        return f"{channels} features; the compiled kernel takes multiples of {2 * LANES} up to {MOST_CHANNELS}"
    return ""


def usable(x: Tensor) -> bool:
    """Return whether the kernel can take `x` now, as `why_not` has it."""
    return not why_not(x)


class Mix(torch.autograd.Function):
    """`mix`, as autograd knows it."""

    @staticmethod
    def plain(
        x: Tensor, norm: Tensor, widen: Tensor, bias: Tensor, narrow: Tensor, out_bias: Tensor, skip: Any = None
    ) -> Tensor:
        """Compute it by torch's operations."""
        normed = F.layer_norm(x.permute(0, 2, 3, 1), norm.shape, norm, None, EPS).permute(0, 3, 1, 2)
        first, second = normed.chunk(2, dim=1)
        inner = F.silu(F.conv2d(first, widen, bias))
        both = torch.cat([F.conv2d(inner, narrow, out_bias), second], dim=1)
        out = both.reshape(len(x), GROUPS, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape) + x
        return out if skip is None else out + skip

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, widen: Tensor, bias: Tensor, narrow: Tensor, out_bias: Tensor, skip: Any
    ) -> Tensor:
        """Keep the input only."""
        ctx.save_for_backward(x, norm, widen, bias, narrow, out_bias)  # as given: only so is it part of the graph
        x, out = _dense(x), _new_like(x)
        skip = None if skip is None else _dense(skip)
        weights = _mix_weights(norm, widen, bias, narrow, out_bias)
        sizes = (x.numel() // x.shape[1], x.shape[1], len(bias))
        kernel.mix(_image(x), None, _image(skip), _image(out), weights.numpy(), None, *sizes, _threads())
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Gradients:
        """Compute everything between again."""
        d_skip = slope if ctx.needs_input_grad[6] else None
        x, norm, widen, bias, narrow, out_bias = ctx.saved_tensors
        if to_be_plain(slope):
            return *plain_gradients(Mix.plain, ctx.saved_tensors, ctx.needs_input_grad, slope), d_skip
        x, dense, d_x = _dense(x), _dense(slope), _new_like(x)
        half, hidden = len(out_bias), len(bias)
        weights = _mix_weights(norm, widen, bias, narrow, out_bias)
        parts = [2 * half, half * hidden, hidden, hidden * half, half]
        sums = x.new_empty(sum(parts))
        sizes = (x.numel() // x.shape[1], 2 * half, hidden)
        kernel.mix(_image(x), _image(dense), None, _image(d_x), weights.numpy(), sums.numpy(), *sizes, _threads())
        d_norm, d_widen, d_bias, d_narrow, d_out_bias = torch.split(sums, parts)
        quarter, groups = half * 2 // GROUPS, GROUPS // 2
        return (
            d_x,
            d_norm,
            _laid_out(d_widen.view(half, hidden).t(), widen),
            d_bias,
            _laid_out(d_narrow.view(hidden, quarter, groups).permute(2, 1, 0), narrow),
            d_out_bias.view(quarter, groups).t().reshape(half),
            d_skip,
        )


def _mix_weights(norm: Tensor, widen: Tensor, bias: Tensor, narrow: Tensor, out_bias: Tensor) -> Tensor:
    """All weights as the kernel reads them, the outputs of the MLP in the order in which the shuffle leaves them."""
    hidden, half = widen.shape[:2]
    groups = GROUPS // 2
    first = widen.reshape(hidden, half)
    second = narrow.reshape(groups, half // groups, hidden).transpose(0, 1).reshape(half, hidden)
    order = out_bias.view(groups, half // groups).t()
    return _flat(norm, first.t(), bias, second.t(), order, first, second)


class Project(torch.autograd.Function):
    """`project`, as autograd knows it."""

    @staticmethod
    def plain(inner: Tensor, weight: Tensor, bias: Tensor, skip: Any = None) -> Tensor:
        """Compute it by torch's operations."""
        out = F.conv2d(F.silu(inner), weight, bias)
        return out if skip is None else out + skip

    @staticmethod
    def forward(ctx: Any, inner: Tensor, weight: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
        """Keep the input before its SiLU only."""
        ctx.save_for_backward(inner, weight, bias)
        inner, skip, out = _dense(inner), _dense(skip), _new_like(skip)
        _project(inner, None, skip, out, weight, bias, None)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Gradients:
        """Compute the SiLU again."""
        inner, weight, bias = ctx.saved_tensors
        if to_be_plain(slope):
            return *plain_gradients(Project.plain, ctx.saved_tensors, ctx.needs_input_grad, slope), slope
        inner, dense, d_inner = _dense(inner), _dense(slope), _new_like(inner)
        parts = [weight.numel(), len(bias)]
        sums = inner.new_empty(sum(parts))
        _project(inner, dense, None, d_inner, weight, bias, sums)
        d_weight, d_bias = torch.split(sums, parts)
        channels, wide = weight.shape[:2]
        return d_inner, _laid_out(d_weight.view(wide, channels).t(), weight), d_bias, slope


def _project(
    inner: Tensor, slope: Tensor | None, skip: Tensor | None, out: Tensor, weight: Tensor, bias: Tensor, sums: Any
) -> None:
    matrix = weight.reshape(weight.shape[:2])
    weights = _flat(matrix.t(), bias, matrix).numpy()
    sizes = (inner.numel() // inner.shape[1], *weight.shape[:2])
    totals = None if sums is None else sums.numpy()
    kernel.project(_image(inner), _image(slope), _image(skip), _image(out), weights, totals, *sizes, _threads())


class Enlarge(torch.autograd.Function):
    """`enlarge`, as autograd knows it."""

    @staticmethod
    def plain(x: Tensor, weight: Tensor, bias: Tensor, factor: int, tail: Any = None, tail_bias: Any = None) -> Tensor:
        """Compute it by torch's operations."""
        out = F.silu(F.pixel_shuffle(F.conv2d(x, weight, bias), factor))
        return out if tail is None else F.conv2d(out, tail, tail_bias, padding=1)

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, factor: int, tail: Any, tail_bias: Any) -> Tensor:
        """Keep the input only."""
        ctx.save_for_backward(x, weight, bias, tail, tail_bias)
        x = _dense(x)
        images, channels, height, width = x.shape
        ctx.factor = factor
        shape = (images, channels if tail is None else len(tail), height * factor, width * factor)
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        _enlarge(x, None, out, weight, bias, factor, tail, tail_bias, None)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Gradients:
        """Compute everything between again."""
        x, weight, bias, tail, tail_bias = ctx.saved_tensors
        if to_be_plain(slope):

            def plain(x: Tensor, weight: Tensor, bias: Tensor, tail: Any, tail_bias: Any) -> Tensor:
                return Enlarge.plain(x, weight, bias, ctx.factor, tail, tail_bias)

            needs = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[4:]]
            d_x, d_weight, d_bias, d_tail, d_tail_bias = plain_gradients(plain, ctx.saved_tensors, needs, slope)
            return d_x, d_weight, d_bias, None, d_tail, d_tail_bias
        x, slope, d_x = _dense(x), _dense(slope), _new_like(x)
        channels, places = x.shape[1], ctx.factor**2
        parts = [weight.numel(), len(bias), 0 if tail is None else channels * TAIL]
        sums = x.new_empty(sum(parts))
        _enlarge(x, slope, d_x, weight, bias, ctx.factor, tail, tail_bias, sums)
        d_weight, d_bias, d_tail = torch.split(sums, parts)
        return (
            d_x,
            _laid_out(d_weight.view(places, channels, channels).transpose(0, 1), weight),
            d_bias.view(places, channels).t().reshape(bias.shape),
            None,
            None if tail is None else _untangle(d_tail, tail),
            None if tail is None else slope.sum((0, 2, 3)),
        )


def _untangle(d_tail: Tensor, tail: Tensor) -> Tensor:
    colours, channels, height, width = tail.shape
    used = d_tail.view(channels, TAIL)[:, : height * width * colours]
    return _laid_out(used.reshape(channels, height, width, colours).permute(3, 0, 1, 2), tail)


def _enlarge(
    x: Tensor, slope: Any, out: Tensor, weight: Tensor, bias: Tensor, factor: int, tail: Any, tail_bias: Any, sums: Any
) -> None:
    images, channels, height, width = x.shape
    matrices = weight.reshape(channels, factor**2, channels)  # a pixel shuffle takes places from neighbouring channels
    pieces = [matrices.permute(1, 2, 0), bias.view(channels, factor**2).t(), matrices.transpose(0, 1)]
    if tail is not None:
        taps = tail.permute(1, 2, 3, 0).reshape(channels, math.prod(tail.shape) // channels)
        taps = F.pad(taps, (0, TAIL - taps.shape[1]))
        pieces += [taps, taps.t()]
    weights = _flat(*pieces).numpy()
    colours, totals = None if tail is None else _flat(tail_bias).numpy(), None if sums is None else sums.numpy()
    sizes = (images, height, width, channels, factor, _threads())
    kernel.enlarge(_image(x), _image(slope), colours, _image(out), weights, totals, *sizes)


class Depthwise(torch.autograd.Function):
    """`depthwise`, as autograd knows it: torch's own, but for the gradient of the weights."""

    @staticmethod
    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Compute it by torch's operations."""
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Keep the input."""
        ctx.save_for_backward(x, weight, bias)
        return _dense(Depthwise.plain(_dense(x), weight, bias))

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Gradients:
        """Leave the input's gradient to torch."""
        x, weight, _ = ctx.saved_tensors
        if to_be_plain(slope):
            return plain_gradients(Depthwise.plain, ctx.saved_tensors, ctx.needs_input_grad, slope)
        x, slope = _dense(x), _dense(slope)
        images, channels, height, width = x.shape
        size = weight.shape[-1]
        sums = x.new_empty((size**2 + 1) * channels)
        kernel.depthwise(_image(x), _image(slope), sums.numpy(), images, height, width, channels, size, _threads())
        pad, one, mask = [size // 2] * 2, [1, 1], [True, False, False]
        d_x = torch.ops.aten.convolution_backward(slope, x, weight, None, one, pad, one, False, [0, 0], channels, mask)[
            0
        ]
        return d_x, _laid_out(sums[:-channels].view(size**2, channels).t(), weight), sums[-channels:]


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Run one of the functions above on the kernel."""
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


def _laid_out(gradient: Tensor, weight: Tensor) -> Tensor:
    """Copy a gradient to the weight's strides, even those along sides of 1, which DistributedDataParallel compares."""
    return torch.empty_like(weight).copy_(gradient.reshape(weight.shape))


def _dense(x: Tensor) -> Tensor:
    return x.resolve_neg().contiguous(memory_format=torch.channels_last)


def _new_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _flat(*pieces: Tensor) -> Tensor:
    return torch.cat([piece.detach().reshape(-1) for piece in pieces])


def _image(x: Tensor | None) -> Any:
    """A channels-last (N, C, H, W) as an array (N, H, W, C), which the kernel takes only if it is dense."""
    return None if x is None else x.detach().numpy().transpose(0, 2, 3, 1)


def _threads() -> int:
    return min(torch.get_num_threads(), MOST_THREADS)
