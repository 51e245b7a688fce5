"""The operations of the mixing kernel as autograd functions, each with its `fallback` in torch's own operations.

Kernel and fallback agree up to rounding. Images are float32 (N, C, H, W), C a multiple of 32; check other inputs with
`mixing_kernel.why_not` first. Intermediate values never reach memory: the backward passes compute them again. Gradients
of weights have the strides of the weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import SHUFFLE_GROUPS
from model.cpu import mixing_kernel
from model.cpu.fallback import fallback_gradients, needs_fallback
from model.cpu.mixing_kernel import thread_count
from model.cpu.tensors import as_array, channels_last, empty_like, packed, with_strides_of

TAIL = 32  # columns of the tail's matrix: 9 taps of 3 colours, rounded up
NORM_EPS = 1e-5

Gradients = tuple[Tensor | None, ...]


class Mix(torch.autograd.Function):
    """Norm, MLP on half of the channels, shuffle, skip; plus a second skip if there is one."""

    @staticmethod
    def fallback(
        x: Tensor, norm: Tensor, widen: Tensor, bias: Tensor, narrow: Tensor, out_bias: Tensor, skip: Any = None
    ) -> Tensor:
        """Compute the same by torch's own operations."""
        normed = F.layer_norm(x.permute(0, 2, 3, 1), norm.shape, norm, None, NORM_EPS).permute(0, 3, 1, 2)
        first, second = normed.chunk(2, dim=1)
        inner = F.silu(F.conv2d(first, widen, bias))
        both = torch.cat([F.conv2d(inner, narrow, out_bias), second], dim=1)
        out = both.reshape(len(x), SHUFFLE_GROUPS, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape) + x
        return out if skip is None else out + skip

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, widen: Tensor, bias: Tensor, narrow: Tensor, out_bias: Tensor, skip: Any
    ) -> Tensor:
        """Run the kernel; save the input and the weights only."""
        ctx.save_for_backward(
            x, norm, widen, bias, narrow, out_bias
        )  # not the channels-last copies, which have no graph
        x, out = channels_last(x), empty_like(x)
        skip = None if skip is None else channels_last(skip)
        weights = _packed_mix_weights(norm, widen, bias, narrow, out_bias)
        sizes = (x.numel() // x.shape[1], x.shape[1], len(bias))
        arrays = as_array(x), None, as_array(skip), as_array(out)
        mixing_kernel.extension.mix(*arrays, weights.numpy(), None, *sizes, thread_count())
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Gradients:
        """Recompute the intermediate values."""
        d_skip = grad_out if ctx.needs_input_grad[6] else None
        x, norm, widen, bias, narrow, out_bias = ctx.saved_tensors
        if needs_fallback(grad_out):
            return *fallback_gradients(Mix.fallback, ctx.saved_tensors, ctx.needs_input_grad, grad_out), d_skip
        x, dense, d_x = channels_last(x), channels_last(grad_out), empty_like(x)
        half, hidden = len(out_bias), len(bias)
        weights = _packed_mix_weights(norm, widen, bias, narrow, out_bias)
        lengths = [2 * half, half * hidden, hidden, hidden * half, half]
        grads = x.new_empty(sum(lengths))
        sizes = (x.numel() // x.shape[1], 2 * half, hidden)
        arrays = as_array(x), as_array(dense), None, as_array(d_x)
        mixing_kernel.extension.mix(*arrays, weights.numpy(), grads.numpy(), *sizes, thread_count())
        d_norm, d_widen, d_bias, d_narrow, d_out_bias = torch.split(grads, lengths)
        quarter, groups = half * 2 // SHUFFLE_GROUPS, SHUFFLE_GROUPS // 2
        return (
            d_x,
            d_norm,
            with_strides_of(widen, d_widen.view(half, hidden).t()),
            d_bias,
            with_strides_of(narrow, d_narrow.view(hidden, quarter, groups).permute(2, 1, 0)),
            d_out_bias.view(quarter, groups).t().reshape(half),
            d_skip,
        )


def _packed_mix_weights(norm: Tensor, widen: Tensor, bias: Tensor, narrow: Tensor, out_bias: Tensor) -> Tensor:
    """Pack weights as the kernel reads them, the outputs of the MLP in the order of the shuffled channels."""
    hidden, half = widen.shape[:2]
    groups = SHUFFLE_GROUPS // 2
    first = widen.reshape(hidden, half)
    second = narrow.reshape(groups, half // groups, hidden).transpose(0, 1).reshape(half, hidden)
    order = out_bias.view(groups, half // groups).t()
    return packed(norm, first.t(), bias, second.t(), order, first, second)


class Project(torch.autograd.Function):
    """SiLU, 1x1 convolution, skip."""

    @staticmethod
    def fallback(inner: Tensor, weight: Tensor, bias: Tensor, skip: Any = None) -> Tensor:
        """Compute the same by torch's own operations."""
        out = F.conv2d(F.silu(inner), weight, bias)
        return out if skip is None else out + skip

    @staticmethod
    def forward(ctx: Any, inner: Tensor, weight: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
        """Run the kernel; save the input of the SiLU, and the weights."""
        ctx.save_for_backward(inner, weight, bias)
        inner, skip, out = channels_last(inner), channels_last(skip), empty_like(skip)
        _run_project(inner, None, skip, out, weight, bias, None)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Gradients:
        """Recompute the SiLU."""
        inner, weight, bias = ctx.saved_tensors
        if needs_fallback(grad_out):
            return *fallback_gradients(Project.fallback, ctx.saved_tensors, ctx.needs_input_grad, grad_out), grad_out
        inner, dense, d_inner = channels_last(inner), channels_last(grad_out), empty_like(inner)
        lengths = [weight.numel(), len(bias)]
        grads = inner.new_empty(sum(lengths))
        _run_project(inner, dense, None, d_inner, weight, bias, grads)
        d_weight, d_bias = torch.split(grads, lengths)
        channels, wide = weight.shape[:2]
        return d_inner, with_strides_of(weight, d_weight.view(wide, channels).t()), d_bias, grad_out


def _run_project(
    inner: Tensor, grad_out: Tensor | None, skip: Tensor | None, out: Tensor, weight: Tensor, bias: Tensor, grads: Any
) -> None:
    matrix = weight.reshape(weight.shape[:2])
    weights = packed(matrix.t(), bias, matrix).numpy()
    sizes = (inner.numel() // inner.shape[1], *weight.shape[:2])
    arrays = as_array(inner), as_array(grad_out), as_array(skip), as_array(out)
    grads_array = None if grads is None else grads.numpy()
    mixing_kernel.extension.project(*arrays, weights, grads_array, *sizes, thread_count())


class Enlarge(torch.autograd.Function):
    """1x1 convolution, pixel shuffle, SiLU; then the 3x3 convolution to RGB if there is a `tail`."""

    @staticmethod
    def fallback(
        x: Tensor, weight: Tensor, bias: Tensor, factor: int, tail: Any = None, tail_bias: Any = None
    ) -> Tensor:
        """Compute the same by torch's own operations."""
        out = F.silu(F.pixel_shuffle(F.conv2d(x, weight, bias), factor))
        return out if tail is None else F.conv2d(out, tail, tail_bias, padding=1)

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, factor: int, tail: Any, tail_bias: Any) -> Tensor:
        """Run the kernel; save the input and the weights only."""
        ctx.save_for_backward(x, weight, bias, tail, tail_bias)
        x = channels_last(x)
        images, channels, height, width = x.shape
        ctx.factor = factor
        shape = (images, channels if tail is None else len(tail), height * factor, width * factor)
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        _run_enlarge(x, None, out, weight, bias, factor, tail, tail_bias, None)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Gradients:
        """Recompute the intermediate values."""
        x, weight, bias, tail, tail_bias = ctx.saved_tensors
        if needs_fallback(grad_out):

            def fallback(x: Tensor, weight: Tensor, bias: Tensor, tail: Any, tail_bias: Any) -> Tensor:
                return Enlarge.fallback(x, weight, bias, ctx.factor, tail, tail_bias)

            needed = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[4:]]
            *first, d_tail, d_tail_bias = fallback_gradients(fallback, ctx.saved_tensors, needed, grad_out)
            return *first, None, d_tail, d_tail_bias
        x, grad_out, d_x = channels_last(x), channels_last(grad_out), empty_like(x)
        channels, places = x.shape[1], ctx.factor**2
        lengths = [weight.numel(), len(bias), 0 if tail is None else channels * TAIL]
        grads = x.new_empty(sum(lengths))
        _run_enlarge(x, grad_out, d_x, weight, bias, ctx.factor, tail, tail_bias, grads)
        d_weight, d_bias, d_tail = torch.split(grads, lengths)
        return (
            d_x,
            with_strides_of(weight, d_weight.view(places, channels, channels).transpose(0, 1)),
            d_bias.view(places, channels).t().reshape(bias.shape),
            None,
            None if tail is None else _tail_gradient(d_tail, tail),
            None if tail is None else grad_out.sum((0, 2, 3)),
        )


def _tail_gradient(d_tail: Tensor, tail: Tensor) -> Tensor:
    colours, channels, height, width = tail.shape
    used = d_tail.view(channels, TAIL)[:, : height * width * colours]
    return with_strides_of(tail, used.reshape(channels, height, width, colours).permute(3, 0, 1, 2))


def _run_enlarge(
    x: Tensor, grad_out: Any, out: Tensor, weight: Tensor, bias: Tensor, factor: int, tail: Any, tail_bias: Any,
    grads: Any,
) -> None:  # fmt: skip
    images, channels, height, width = x.shape
    matrices = weight.reshape(
        channels, factor**2, channels
    )  # a pixel shuffle spreads neighbouring channels over pixels
    pieces = [matrices.permute(1, 2, 0), bias.view(channels, factor**2).t(), matrices.transpose(0, 1)]
    if tail is not None:
        taps = tail.permute(1, 2, 3, 0).reshape(channels, math.prod(tail.shape) // channels)
        taps = F.pad(taps, (0, TAIL - taps.shape[1]))
        pieces += [taps, taps.t()]
    weights = packed(*pieces).numpy()
    arrays = as_array(x), as_array(grad_out), None if tail is None else packed(tail_bias).numpy(), as_array(out)
    grads_array = None if grads is None else grads.numpy()
    sizes = (images, height, width, channels, factor, thread_count())
    mixing_kernel.extension.enlarge(*arrays, weights, grads_array, *sizes)


class Depthwise(torch.autograd.Function):
    """Depth-wise convolution; only the gradient of its weights is the kernel's, the rest is torch's."""

    @staticmethod
    def fallback(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Compute the same by torch's own operations."""
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Run torch's convolution; save the input."""
        ctx.save_for_backward(x, weight, bias)
        return channels_last(Depthwise.fallback(channels_last(x), weight, bias))

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Gradients:
        """Run the kernel for the weights, torch for the input."""
        x, weight, _ = ctx.saved_tensors
        if needs_fallback(grad_out):
            return fallback_gradients(Depthwise.fallback, ctx.saved_tensors, ctx.needs_input_grad, grad_out)
        x, grad_out = channels_last(x), channels_last(grad_out)
        images, channels, height, width = x.shape
        size = weight.shape[-1]
        grads = x.new_empty((size**2 + 1) * channels)
        sizes = (images, height, width, channels, size, thread_count())
        mixing_kernel.extension.depthwise(as_array(x), as_array(grad_out), grads.numpy(), *sizes)
        pad, one, mask = [size // 2] * 2, [1, 1], [True, False, False]
        found = torch.ops.aten.convolution_backward(
            grad_out, x, weight, None, one, pad, one, False, [0, 0], channels, mask
        )
        return found[0], with_strides_of(weight, grads[:-channels].view(size**2, channels).t()), grads[-channels:]


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Run one of the functions above on the kernel, recorded by autograd."""
    result: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return result
