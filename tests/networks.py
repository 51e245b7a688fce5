"""Run networks with and without the compiled mixing kernel, and compare the results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.cpu import mixing_kernel, operations
from model.shufflemixer import ShuffleMixer

needs_mixing_kernel = pytest.mark.skipif(
    mixing_kernel.extension is None, reason="the mixing kernel is not built, or not for this processor"
)


def small_network(**changes: Any) -> ShuffleMixer:
    """Return a network that the kernel takes; all weights are random, also those that start as 0 or 1."""
    torch.manual_seed(0)
    network = ShuffleMixer(**({"features": 32, "kernel_size": 3, "blocks": 1, "scale": 2} | changes))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


@contextmanager
def kernel_off() -> Iterator[None]:
    """Switch the compiled kernel off."""
    extension, mixing_kernel.extension = mixing_kernel.extension, None
    try:
        yield
    finally:
        mixing_kernel.extension = extension


@contextmanager
def kernel_calls() -> Iterator[list[str]]:
    """Collect the names of the operations whose forward pass runs on the kernel."""
    names: list[str] = []
    apply = operations.apply

    def recorded(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
        names.append(function.__name__)
        return apply(function, *arguments)

    operations.apply = recorded
    try:
        yield names
    finally:
        operations.apply = apply


def step(network: nn.Module, lr: Tensor) -> list[Tensor | None]:
    """Return the output, and the gradients of the input and all weights."""
    torch.manual_seed(1)  # for dropout
    network.zero_grad()
    lr = lr.clone().requires_grad_()
    out = network(lr)
    grad_out = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape).sin()
    torch.autograd.backward(out, grad_out)
    return [out.detach(), lr.grad, *(parameter.grad for parameter in network.parameters())]


def outcome(work: Callable[[], list[Tensor | None]]) -> list[Tensor | None] | str:
    """Return the result of `work`, or the name of its exception."""
    try:
        return work()
    except Exception as error:
        return type(error).__name__


def assert_same(got: list[Tensor | None] | str, expected: list[Tensor | None] | str, what: str = "") -> None:
    """Check that outcomes are the same exceptions, or the same values up to rounding."""
    if isinstance(got, str) or isinstance(expected, str):
        assert isinstance(got, str) == isinstance(expected, str), f"{what}: {got!r} instead of {expected!r}"
        assert got == expected, what
        return
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None), what
        if one is not None and other is not None:
            assert one.shape == other.shape, what
            difference = float((one - other).abs().max())
            assert difference <= 2e-5 * max(float(other.abs().max()), 1e-3), f"{what}: {difference}"


def compare(network: nn.Module, lr: Tensor, what: str = "", restore: bool = True) -> list[Tensor | None] | str:
    """Check that a network has the same outcome with and without the kernel; return it."""
    state = copy.deepcopy(network.state_dict())  # buffers may change in a step
    got = outcome(lambda: step(network, lr))
    if restore:
        network.load_state_dict(state)
    with kernel_off():
        expected = outcome(lambda: step(network, lr))
    assert_same(got, expected, what)
    return expected
