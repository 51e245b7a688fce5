"""Tensors in the layouts that the mixing kernel reads and writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """Return `x` in contiguous channels-last memory, copied only if it is not."""
    return x.resolve_neg().contiguous(memory_format=torch.channels_last)


def empty_like(x: Tensor) -> Tensor:
    """Return an uninitialised channels-last tensor of the shape of `x`."""
    return torch.empty_like(x, memory_format=torch.channels_last)


def as_array(x: Tensor | None) -> Any:
    """View a channels-last tensor (N, C, H, W) as a numpy array (N, H, W, C)."""
    return None if x is None else x.detach().numpy().transpose(0, 2, 3, 1)


def packed(*pieces: Tensor) -> Tensor:
    """Copy tensors into one flat tensor, one after another."""
    return torch.cat([piece.detach().reshape(-1) for piece in pieces])


def with_strides_of(weight: Tensor, gradient: Tensor) -> Tensor:
    """Copy a gradient to the strides of its weight, along sides of 1 too: DistributedDataParallel compares them all."""
    return torch.empty_like(weight).copy_(gradient.reshape(weight.shape))
