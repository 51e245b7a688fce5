"""The mixing kernel's operations: values and gradients of plain torch, for every shape that they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import needs_mixing_kernel
from torch import Tensor

from model.cpu import mixing_kernel, operations
from model.shufflemixer import ShuffleMixer

pytestmark = needs_mixing_kernel

SHAPES: list[tuple[dict[str, Any], tuple[int, int, int]]] = [
    ({"features": 32, "kernel_size": 3, "scale": 2}, (2, 7, 11)),
    ({"features": 32, "kernel_size": 3, "scale": 3}, (1, 40, 9)),  # two bands of lines
    ({"features": 64, "kernel_size": 7, "scale": 4}, (1, 12, 20)),
    ({"features": 64, "kernel_size": 7, "scale": 2}, (3, 3, 70)),  # two blocks of pixels; fewer lines than taps
    ({"features": 96, "kernel_size": 5, "scale": 2, "mlp_ratio": 1}, (1, 6, 5)),
    ({"features": 32, "kernel_size": 9, "scale": 4, "mlp_ratio": 3}, (1, 5, 4)),
    ({"features": 32, "kernel_size": 7, "scale": 2}, (1, 1, 1)),
]


def step(network: ShuffleMixer, lr: Tensor, grad_out: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of the input and all weights."""
    network.zero_grad()
    lr = lr.clone().requires_grad_()
    sr = network(lr)
    torch.autograd.backward(sr, grad_out)
    gradients = [leaf.grad for leaf in (lr, *network.parameters())]
    assert all(gradient is not None for gradient in gradients)
    return [sr.detach(), *(gradient for gradient in gradients if gradient is not None)]


def example(config: dict[str, Any], shape: tuple[int, int, int]) -> tuple[ShuffleMixer, Tensor, Tensor]:
    torch.manual_seed(0)
    batch, height, width = shape
    network = ShuffleMixer(**({"blocks": 1} | config))
    with torch.no_grad():
        for parameter in network.parameters():  # norms of 1 and small biases would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.1)
    scale = network.config.scale
    return network, torch.rand(batch, 3, height, width), torch.randn(batch, 3, height * scale, width * scale)


@pytest.fixture(params=[16, 8])
def lanes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the kernel with vectors of that many floats."""
    if mixing_kernel.start(request.param) is None:
        pytest.skip("this processor has no such vectors")
    yield
    mixing_kernel.start()


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize(("config", "shape"), SHAPES)
def test_values_and_gradients_agree_with_plain_torch(config: dict[str, Any], shape: tuple[int, int, int]) -> None:
    network, lr, grad_out = example(config, shape)
    got = step(network, lr, grad_out)
    expected = step(network.double(), lr.double(), grad_out.double())
    for value, truth in zip(got, expected, strict=True):
        assert (value - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_kernel_runs_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    network, lr, grad_out = example(*SHAPES[0])
    called: list[str] = []
    for function in (operations.Mix, operations.Project, operations.Enlarge, operations.Depthwise):
        backward = function.backward

        def counted(*arguments: Any, name: str = function.__name__, backward: Any = backward) -> Any:
            called.append(name)
            return backward(*arguments)

        monkeypatch.setattr(function, "backward", staticmethod(counted))
    step(network, lr, grad_out)
    assert sorted(called) == ["Depthwise"] * 2 + ["Enlarge"] + ["Mix"] * 4 + ["Project"]


def test_results_do_not_depend_on_threads(one_thread: None) -> None:
    network, _, _ = example({"features": 32, "kernel_size": 3, "scale": 2}, (2, 20, 24))

    def weights(name: str) -> tuple[Tensor, Tensor]:
        return network.get_parameter(f"{name}.weight"), network.get_parameter(f"{name}.bias")

    norm = network.get_parameter("blocks.0.net.0.norm1.body.weight")
    mlp = weights("blocks.0.net.0.mlp1.fc.0"), weights("blocks.0.net.0.mlp1.fc.2")
    x, skip = torch.randn(2, 2, 32, 20, 24).unbind()
    calls: dict[str, Callable[[], Tensor]] = {
        "mix": lambda: operations.apply(operations.Mix, x, norm, *mlp[0], *mlp[1], skip),
        "project": lambda: operations.apply(
            operations.Project, x.repeat(1, 2, 1, 1)[:, :48], *weights("blocks.0.conv.2"), skip
        ),
        "enlarge": lambda: operations.apply(operations.Enlarge, x, *weights("upsapling.0"), 2, None, None),
        "to RGB": lambda: operations.apply(operations.Enlarge, x, *weights("upsapling.0"), 2, *weights("tail")),
        "depthwise": lambda: operations.apply(operations.Depthwise, x, *weights("blocks.0.net.0.spatial")),
    }
    for name, call in calls.items():
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            network.zero_grad()
            out = call()
            torch.autograd.backward(out.sum())
            # Without the tail's bias: its gradient is torch's sum, which depends on threads.
            gradients = [p.grad for p in network.parameters() if p.grad is not None and p.numel() != 3]
            results.append([out.detach(), *gradients])
        for others in results[1:]:
            assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True)), name


def test_unusable_inputs() -> None:
    x = torch.rand(1, 32, 4, 4)
    assert mixing_kernel.usable(x)
    assert not mixing_kernel.usable(x.double())
    assert not mixing_kernel.usable(x.bfloat16())
    assert not mixing_kernel.usable(x.to("meta"))
    assert not mixing_kernel.usable(x[:, :16])
    assert not mixing_kernel.usable(x[:0])
    with torch.autocast("cpu", torch.bfloat16):
        assert not mixing_kernel.usable(x)

    def mapped(image: Tensor) -> Tensor:
        assert not mixing_kernel.usable(image[None])
        return image

    torch.vmap(mapped)(x)


def test_memory_formats_do_not_matter() -> None:
    network, lr, grad_out = example(*SHAPES[0])
    expected = step(network, lr, grad_out)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    got = step(network, lr.contiguous(memory_format=torch.channels_last), grad_out.transpose(2, 3).mT)
    for value, other in zip(got, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)


def test_nan_stays_nan() -> None:
    network, lr, _ = example(*SHAPES[0])
    lr[0, 0, 3, 3] = float("nan")
    with torch.inference_mode():
        sr = network(lr)
    assert sr[0].isnan().any()
    assert sr[1].isfinite().all()
