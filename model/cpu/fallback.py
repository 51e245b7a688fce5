"""Gradients by torch's own operations, where an operation's backward pass cannot use the compiled kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from model.cpu.torch_state import active_mode


def needs_fallback(grad_out: Tensor) -> bool:
    """Return whether the kernel cannot take this gradient, or gradients of gradients are wanted."""
    return (
        torch.is_grad_enabled()
        or bool(active_mode())
        or type(grad_out) is not Tensor
        or grad_out.dtype is not torch.float32
        or grad_out.layout is not torch.strided
        or grad_out._is_zerotensor()
        or torch._C._functorch.is_legacy_batchedtensor(grad_out)  # several gradients at once
    )


def fallback_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Any], needed: Sequence[bool], grad_out: Tensor
) -> tuple[Tensor | None, ...]:
    """Differentiate `function` at `inputs`: a gradient for each input that is `needed`, None for the others.

    In grad mode the gradients can themselves be differentiated.
    """
    create_graph = torch.is_grad_enabled()
    wanted = [i for i, value in enumerate(inputs) if value is not None and needed[i]]
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        # Aliases: if another input was computed from a weight, only the weight's direct use counts here.
        aliases = [
            value.view_as(value) if value is not None and i in wanted else value for i, value in enumerate(inputs)
        ]
        out = function(*aliases)
        found = torch.autograd.grad(out, [aliases[i] for i in wanted], grad_out, create_graph=create_graph)
    gradients: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return tuple(gradients)
