"""When plain torch operations have to do what the compiled kernel does, and how they do it in its backward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def busy() -> str:
    """Say what of torch's state the kernel would bypass, such as a mode that counts operations; "" if nothing."""
    if torch.compiler.is_compiling():
        return "torch compiles or exports"
    if torch._C._get_tracing_state():
        return "torch traces"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a torch dispatch or function mode is active"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return ""


def to_be_plain(slope: Tensor) -> bool:
    """Whether a gradient is to be differentiated again, or is not one for the kernel."""
    return (
        torch.is_grad_enabled()
        or bool(busy())
        or type(slope) is not Tensor
        or slope.dtype is not torch.float32
        or slope.layout is not torch.strided
        or slope._is_zerotensor()
        or torch._C._functorch.is_legacy_batchedtensor(slope)  # of several gradients at once
    )


def plain_gradients(
    plain: Callable[..., Tensor], inputs: Sequence[Any], needs: Sequence[bool], slope: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of `inputs` by torch's own operations, which are differentiable themselves if asked for."""
    again = torch.is_grad_enabled()
    wanted = [i for i, value in enumerate(inputs) if value is not None and needs[i]]
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        # Aliases: where a weight has made an input too, only this use of it counts here.
        aliases = [
            value.view_as(value) if value is not None and i in wanted else value for i, value in enumerate(inputs)
        ]
        out = plain(*aliases)
        found = torch.autograd.grad(out, [aliases[i] for i in wanted], slope, create_graph=again)
    gradients: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return tuple(gradients)
