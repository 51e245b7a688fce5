"""States of torch in which the kernel must not run: higher derivatives, modes, tracing, hooks, tensor subclasses."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import assert_same, compare, kernel_calls, kernel_off, needs_mixing_kernel, small_network, step
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model.config import ShuffleMixerConfig
from model.cpu import eligibility, kernel_parts
from model.shufflemixer import ShuffleMixer

pytestmark = [
    needs_mixing_kernel,
    pytest.mark.usefixtures("one_thread"),
]

LR = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(3))


def both(work: Callable[[], Any]) -> tuple[Any, Any]:
    """Return the results of `work` with and without the kernel."""
    got = work()
    with kernel_off():
        return got, work()


def test_flops_are_all_counted() -> None:
    network = small_network()

    def count() -> int:
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(network(LR).sum())
        flops: int = counter.get_total_flops()
        return flops

    got, expected = both(count)
    assert got == expected
    assert got > 6 * 2 * network.multiply_accumulates(10, 12) / 2  # the backward pass costs twice the forward pass


def test_modes_see_every_operation() -> None:
    network = small_network()

    def seen(kind: type) -> list[str]:
        names: list[str] = []

        class Recording(kind):  # type: ignore[misc]
            def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                names.append(str(function))
                return function(*args, **(kwargs or {}))

            __torch_dispatch__ = __torch_function__

        with Recording():
            network(LR)
        return [name for name in names if "conv2d" in name or "convolution" in name]

    for kind in (TorchFunctionMode, TorchDispatchMode):
        got, expected = both(lambda kind=kind: seen(kind))  # type: ignore[misc]
        assert got == expected
        assert len(got) == 15


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_derivatives() -> None:
    network, tangent = small_network(), torch.ones_like(LR)
    network(LR)

    def dual() -> Tensor:
        with forward_ad.dual_level():
            out = network(forward_ad.make_dual(LR, tangent))  # type: ignore[no-untyped-call]
            derivative: Tensor = forward_ad.unpack_dual(out).tangent  # type: ignore[no-untyped-call]
            return derivative.clone()

    torch.testing.assert_close(*both(dual))
    torch.testing.assert_close(*both(lambda: torch.func.jvp(network, (LR,), (tangent,))[1]))


def test_functional_transforms() -> None:
    network = small_network()
    weights = {name: weight.detach().clone() for name, weight in network.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(network, weights, (LR,))
        return out.square().sum()

    def gradients() -> list[Tensor | None]:
        found = torch.func.grad(loss)(weights)
        return [found[name] for name in weights]

    assert_same(*both(gradients))
    layer = network.get_submodule("blocks.0")
    x = torch.randn(3, 1, 32, 3, 3, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(*both(lambda: torch.func.vmap(layer)(x)), rtol=1e-4, atol=1e-4)
    with kernel_calls() as names:
        loss(weights)
    assert len(names) == 8


@pytest.mark.parametrize("part", ["", "blocks.0", "blocks.0.net.0", "upsapling"])
@pytest.mark.parametrize("dense", [True, False])
def test_second_derivatives(part: str, dense: bool) -> None:
    """A gradient penalty, differentiated by input and weights."""
    network = small_network(scale=4)
    module = network.get_submodule(part) if part else network
    x = torch.randn(1, 32, 3, 4, generator=torch.Generator().manual_seed(5)) if part else LR[:1, :, :3, :4]
    layout = torch.channels_last if dense else torch.contiguous_format

    def penalty() -> list[Tensor | None]:
        network.zero_grad()
        leaf = x.contiguous(memory_format=layout).requires_grad_()
        (gradient,) = torch.autograd.grad(module(leaf).square().sum(), leaf, create_graph=True)
        torch.autograd.backward(gradient.square().sum())
        return [leaf.grad, *(parameter.grad for parameter in module.parameters())]

    got, expected = both(penalty)
    assert_same(got, expected)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in got)


def test_second_derivatives_of_shared_weights() -> None:
    """A weight that also produced the input counts once for each use."""
    network = small_network()
    layer = network.get_submodule("blocks.0.net.0")

    def third() -> list[Tensor | None]:
        network.zero_grad()
        x = LR.new_ones(1, 32, 3, 3).requires_grad_()
        (gradient,) = torch.autograd.grad(layer(layer(x)).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x, create_graph=True)
        torch.autograd.backward(second.square().mean())
        return [parameter.grad for parameter in layer.parameters()]

    assert_same(*both(third))


def test_gradients_in_batches() -> None:
    """Several gradients at once, as in vectorized Jacobians: the backward pass runs under vmap."""
    network = small_network()
    layer = network.get_submodule("blocks.0")
    x = torch.randn(1, 32, 3, 3, generator=torch.Generator().manual_seed(6)).requires_grad_()

    def batched() -> list[Tensor | None]:
        out = layer(x)
        grad_outs = torch.eye(4).repeat(1, out.numel() // 4).reshape(4, *out.shape)
        found = torch.autograd.grad(out, [x, *layer.parameters()], grad_outs, is_grads_batched=True)
        return [*found]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # operations without a batching rule warn
        assert_same(*both(batched))


@pytest.mark.parametrize("enter", [lambda: FlopCounterMode(display=False), forward_ad.dual_level])
def test_modes_entered_between_forward_and_backward(enter: Callable[[], Any]) -> None:
    network = small_network()

    def backward_in_mode() -> list[Tensor | None]:
        network.zero_grad()
        out = network(LR)
        with enter():
            torch.autograd.backward(out.square().sum())
        return [parameter.grad for parameter in network.parameters()]

    assert_same(*both(backward_in_mode))


def test_unusual_gradients() -> None:
    """Expanded, lazily negated, and zeros without memory."""
    network = small_network()
    for grad_out in (
        torch.ones(()).expand(2, 3, 10, 12),
        torch.complex(torch.zeros(2, 3, 10, 12), torch.ones(2, 3, 10, 12)).conj().imag,
        torch._efficientzerotensor((2, 3, 10, 12)),
    ):

        def backward(grad_out: Tensor = grad_out) -> list[Tensor | None]:
            network.zero_grad()
            torch.autograd.backward(network.upsample(network.blocks(network.to_feat(LR))), grad_out)
            return [parameter.grad for parameter in network.parameters()]

        assert_same(*both(backward))


def test_autocast_uses_the_fallback() -> None:
    network = small_network()
    with torch.autocast("cpu", torch.bfloat16), kernel_calls() as names:
        got, expected = both(lambda: network(LR))
    assert not names
    assert torch.equal(got, expected)


class Counting(Tensor):
    """A subclass that counts the functions called on it."""

    calls: int = 0

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Counting.calls += 1
        return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def test_tensor_subclasses_see_every_function() -> None:
    network = small_network()

    def calls() -> int:
        Counting.calls = 0
        network(LR.as_subclass(Counting))
        return Counting.calls

    got, expected = both(calls)
    assert got == expected > 40
    network.tail.weight = nn.Parameter(network.tail.weight.detach().as_subclass(Counting))

    def calls_of_weight() -> int:
        Counting.calls = 0
        network(LR)
        return Counting.calls

    got, expected = both(calls_of_weight)
    assert got == expected > 0


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_hooks_are_called(kind: str, everywhere: bool) -> None:
    """Global hooks of torch, or hooks on each module, as feature extractors use."""
    network = small_network()
    step(network, LR)
    called: list[str] = []

    def hook(module: nn.Module, *arguments: Any) -> None:
        called.append(type(module).__name__)

    if everywhere:
        register = "register_module_" + kind
        handles = [getattr(nn.modules.module, f"{register}_hook")(hook)]
    else:
        handles = [getattr(module, f"register_{kind}_hook")(hook) for module in network.modules()]
    try:
        step(network, LR)
        got = [*called]
        called.clear()
        with kernel_off():
            step(network, LR)
    finally:
        for handle in handles:
            handle.remove()
    assert got == called
    assert len(got) == len([*network.modules()])
    with kernel_calls() as names:
        network(LR)
    assert len(names) == 8  # without hooks, the kernel runs again


@pytest.mark.filterwarnings("ignore")
def test_compiled_and_traced_networks() -> None:
    network = small_network().eval()
    expected = network(LR)
    with kernel_calls() as names:
        compiled = torch.compile(network, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(LR), expected, rtol=1e-4, atol=1e-5)
        traced = torch.jit.trace(network, (LR,), check_trace=False)  # type: ignore[no-untyped-call]
        torch.testing.assert_close(traced(LR), expected, rtol=1e-4, atol=1e-5)
        exported = torch.export.export(network, (LR,)).module()
        torch.testing.assert_close(exported(LR), expected, rtol=1e-4, atol=1e-5)
    assert not names


def test_comparing_code_has_no_side_effects() -> None:
    """The first use compares code; saved-tensor hooks and the random generator must not notice."""
    eligibility._unknown.cache_clear()
    eligibility._specs.cache_clear()
    network = small_network()
    network.activation_checkpointing = True
    torch.manual_seed(9)
    before = torch.get_rng_state()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):  # type: ignore[func-returns-value]
        network(LR)
    first_use = [*saved]
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):  # type: ignore[func-returns-value]
        network(LR)
    assert saved == first_use
    assert torch.equal(torch.get_rng_state(), before)


CONFIG = ShuffleMixerConfig(32, 3, 1, 2, 2)


def test_edited_code_is_detected() -> None:
    """As if a line of a module's source had been changed: comparing it with the operations shows the difference."""

    def edited(**changes: Any) -> str:
        part = replace(kernel_parts.MIX, **changes)
        modules = part.build(CONFIG)
        return part.why_not(CONFIG, modules)

    def with_fc(make: Callable[[], nn.Module]) -> Callable[[ShuffleMixerConfig], tuple[nn.Module, ...]]:
        def build(config: ShuffleMixerConfig) -> tuple[nn.Module, ...]:
            norm, mlp = kernel_parts.MIX.build(config)
            mlp.get_submodule("fc")._modules["1"] = make()
            return norm, mlp

        return build

    def with_eps(config: ShuffleMixerConfig) -> tuple[nn.Module, ...]:
        norm, mlp = kernel_parts.MIX.build(config)
        norm.get_submodule("body").eps = 1.1e-5  # type: ignore[assignment]
        return norm, mlp

    assert edited() == ""
    assert edited(build=with_fc(nn.SiLU)) == ""
    for build in (with_fc(nn.GELU), with_fc(nn.Identity), with_fc(lambda: nn.Dropout(0.1)), with_eps):
        assert "was edited" in edited(build=build)
    for by_modules in (
        lambda modules, x, skip: kernel_parts.mix_by_modules(modules, x, skip) - x,
        lambda modules, x, skip: kernel_parts.mix_by_modules(modules, x, skip) * 1.0001,
        lambda modules, x, skip: kernel_parts.mix_by_modules(modules, x.detach(), skip),
        lambda modules, x, skip: kernel_parts.mix_by_modules(modules, x, None),
    ):
        assert "was edited" in edited(by_modules=by_modules)


configurations = st.fixed_dictionaries(
    {
        "features": st.sampled_from([8, 32, 40, 64]),
        "kernel_size": st.sampled_from([1, 3, 5, 7, 9]),
        "mlp_ratio": st.integers(1, 3),
        "scale": st.sampled_from([2, 3, 4]),
        **{switch: st.booleans() for switch in ("shuffle", "split", "fused", "norm")},
    }
)


@settings(deadline=None, max_examples=30)
@given(
    config=configurations,
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)),
    channels_last=st.booleans(),
    checkpointing=st.booleans(),
    frozen=st.booleans(),
)
def test_any_configuration(
    config: dict[str, Any], shape: tuple[int, int, int], channels_last: bool, checkpointing: bool, frozen: bool
) -> None:
    network = small_network(**config)
    if channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.activation_checkpointing = checkpointing
    network.blocks.requires_grad_(not frozen)
    batch, height, width = shape
    assert not isinstance(compare(network, torch.rand(batch, 3, height, width), str(config)), str)


@pytest.mark.parametrize("name", ["tiny", "base"])
def test_gradients_have_the_strides_of_weights(name: str) -> None:
    """Along sides of 1 too, since DistributedDataParallel compares all strides."""
    network = ShuffleMixer.preset(name, 2)
    for layout in (torch.contiguous_format, torch.channels_last):
        network = copy.deepcopy(network).to(memory_format=layout)  # type: ignore[call-overload]
        step(network, LR)
        for parameter_name, parameter in network.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.stride() == parameter.stride(), parameter_name
