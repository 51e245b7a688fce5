"""Edited networks run as their code says, whichever part was replaced, changed or hooked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from networks import compare, kernel_calls, kernel_off, needs_mixing_kernel, small_network, step
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from model.cpu import mixing_kernel
from model.layers import ChannelNorm, PointMlp
from model.shufflemixer import FeatureMixingBlock, ShuffleMixer, ShuffleMixerLayer

pytestmark = [
    needs_mixing_kernel,
    pytest.mark.usefixtures("one_thread"),
]

LR = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(3))
NAMES = [name for name, _ in small_network().named_modules() if name]


def replace(network: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, new)


class Wrapped(nn.Module):
    """A user's adapter: it takes `x`, and does not know the private arguments of its neighbours."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.inner(x)
        return inner * 1.25


class Raised(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.25


def subclassed(network: nn.Module, name: str) -> None:
    """Make the module an instance of a subclass that overrides forward."""
    module = network.get_submodule(name)
    kind = type(module)

    def forward(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        return kind.forward(self, *arguments, **named) * 0.75

    module.__class__ = type("Own", (kind,), {"forward": forward})


def patched(network: nn.Module, name: str) -> None:
    module = network.get_submodule(name)
    before = module.forward
    module.forward = lambda *arguments, **named: before(*arguments, **named) * 0.75


def parametrized(network: nn.Module, name: str) -> None:
    module = network.get_submodule(name)
    if isinstance(getattr(module, "weight", None), nn.Parameter):
        parametrize.register_parametrization(module, "weight", Raised())


def normed(network: nn.Module, name: str) -> None:
    module = network.get_submodule(name)
    if isinstance(module, nn.Conv2d):
        parametrizations.weight_norm(module)


def spectral(network: nn.Module, name: str) -> None:
    module = network.get_submodule(name)
    if isinstance(module, nn.Conv2d):
        nn.utils.spectral_norm(module)


def unbiased(network: nn.Module, name: str) -> None:
    module = network.get_submodule(name)
    if hasattr(module, "bias"):
        module.bias = None  # type: ignore[assignment]


def doubled(network: nn.Module, name: str) -> None:
    network.get_submodule(name).double()


def halved(gradients: Any) -> Any:
    return tuple(None if gradient is None else gradient * 0.5 for gradient in gradients)


EDITS: dict[str, Callable[[nn.Module, str], object]] = {
    "Identity": lambda network, name: replace(network, name, nn.Identity()),
    "wrapper": lambda network, name: replace(network, name, Wrapped(network.get_submodule(name))),
    "subclass": subclassed,
    "patched forward": patched,
    "forward hook": lambda network, name: network.get_submodule(name).register_forward_hook(lambda m, i, o: o * 0.5),
    "pre-hook": lambda network, name: network.get_submodule(name).register_forward_pre_hook(lambda m, i: (i[0] * 0.5,)),
    "backward hook": lambda network, name: network.get_submodule(name).register_full_backward_hook(
        lambda m, i, o: halved(i)
    ),
    "backward pre-hook": lambda network, name: network.get_submodule(name).register_full_backward_pre_hook(
        lambda m, o: halved(o)
    ),
    "own parameter": lambda network, name: network.get_submodule(name).register_parameter(
        "extra", nn.Parameter(torch.ones(1))
    ),
    "parametrization": parametrized,
    "weight norm": normed,
    "spectral norm": spectral,
    "no bias": unbiased,
    "float64": doubled,
    "frozen": lambda network, name: network.get_submodule(name).requires_grad_(False),
    "evaluation": lambda network, name: network.get_submodule(name).eval(),
    "compiled": lambda network, name: setattr(network.get_submodule(name), "_compiled_call_impl", lambda *a, **k: LR),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_each_edit_of_each_submodule(edit: Callable[[nn.Module, str], object]) -> None:
    """Edit one submodule at a time, of a network that has run: nothing cached about it may survive."""
    plain = small_network()
    for name in NAMES:
        network = copy.deepcopy(plain)
        step(network, LR)
        edit(network, name)
        compare(network, LR, name)


def conv(like: nn.Conv2d, **changes: Any) -> nn.Conv2d:
    torch.manual_seed(2)
    names = ("in_channels", "out_channels", "kernel_size", "padding", "groups")
    return nn.Conv2d(**({name: getattr(like, name) for name in names} | changes))


REPLACEMENTS: dict[type[nn.Module], list[Callable[[Any], nn.Module]]] = {
    nn.SiLU: [
        lambda _: nn.GELU(),
        lambda _: nn.ReLU(),
        lambda _: nn.SiLU(inplace=True),
        lambda _: nn.Sequential(nn.SiLU()),
        lambda _: nn.Dropout(0.5),
        lambda _: nn.Hardswish(),
    ],
    nn.Conv2d: [
        lambda like: conv(like, bias=False),
        lambda like: conv(like, padding="same", padding_mode="reflect"),
        lambda like: conv(like, padding="same"),
        lambda like: conv(like, padding="same", dilation=2),
        lambda like: conv(like, padding="same", kernel_size=1),
        lambda like: conv(like, padding="same", kernel_size=5),
        lambda like: conv(like, padding="same", padding_mode="circular", kernel_size=(3, 1)),
        lambda like: conv(like, groups=1),
        lambda like: conv(like, out_channels=1, groups=1),
        lambda like: nn.Sequential(like, nn.ReLU()),
        lambda like: nn.Sequential(like, nn.Dropout2d(0.25)),
    ],
    nn.LayerNorm: [
        lambda like: nn.LayerNorm(like.normalized_shape, bias=True),
        lambda like: nn.LayerNorm(like.normalized_shape, eps=1.0, bias=False),
        lambda like: nn.LayerNorm(like.normalized_shape, elementwise_affine=False),
        lambda like: nn.RMSNorm(like.normalized_shape),
        lambda like: nn.Identity(),
    ],
    nn.PixelShuffle: [
        lambda like: nn.Sequential(nn.PixelShuffle(like.upscale_factor), nn.ReLU()),
        lambda like: nn.Upsample(scale_factor=2),
    ],
    ChannelNorm: [lambda like: nn.GroupNorm(4, 32), lambda like: nn.BatchNorm2d(32)],
    PointMlp: [lambda like: nn.Conv2d(32, 32, 1), lambda like: nn.Dropout(0.5)],
    ShuffleMixerLayer: [lambda like: nn.Conv2d(32, 32, 3, padding=1, bias=False)],
    FeatureMixingBlock: [lambda like: nn.Sequential(like, like), lambda like: nn.ReLU(inplace=True)],
    nn.Sequential: [
        lambda like: nn.Sequential(*like, nn.Tanh()),
        lambda like: nn.Sequential(*reversed(like)),
        lambda like: nn.Sequential(*like, *like),
        lambda like: nn.Sequential(*[*like][:1]),
        lambda like: nn.Sequential(),
    ],
}


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_each_submodule_replaced_by_others_of_its_kind(kind: type[nn.Module]) -> None:
    plain = small_network()
    step(plain, LR)
    replaced = 0
    for name in NAMES:
        module = plain.get_submodule(name)
        for i, make in enumerate(REPLACEMENTS[kind] if type(module) is kind else []):
            network = copy.deepcopy(plain)
            replace(network, name, make(network.get_submodule(name)))
            compare(network, LR, f"{name}, {i}")
            replaced += 1
    assert replaced


def other_values(value: object) -> Iterator[object]:
    """Yield other values of the type of `value`."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield value + 1
    elif isinstance(value, str):
        yield "reflect"
    elif isinstance(value, tuple):
        yield tuple(one + 1 for one in value)


def test_each_attribute_changed() -> None:
    plain = small_network()
    step(plain, LR)
    changed = set()
    for name in NAMES:
        for key, value in vars(plain.get_submodule(name)).items():
            if key == "training" or key.startswith(("_is_full", "_backward", "_forward")):
                continue
            for other in other_values(value):
                network = copy.deepcopy(plain)
                setattr(network.get_submodule(name), key, other)
                compare(network, LR, f"{name}.{key} = {other}")
                changed.add(key)
    assert changed >= {"stride", "padding", "dilation", "groups", "padding_mode", "eps", "normalized_shape"}
    assert changed >= {"upscale_factor", "split", "shuffle", "fused", "inplace"}


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: setattr(weight, "data", weight.data.double()),
        lambda weight: setattr(weight, "data", weight.data.transpose(0, -1).contiguous()),
        lambda weight: setattr(weight, "data", weight.data[:1]),
        lambda weight: setattr(weight, "data", weight.data.flatten()),
        lambda weight: setattr(weight, "data", weight.data.contiguous().expand_as(weight)),
        lambda weight: setattr(weight, "data", torch.zeros_like(weight.data)[..., :1].expand_as(weight.data)),
        lambda weight: setattr(weight, "data", weight.data.flip(0)),
        lambda weight: weight.requires_grad_(False),
        lambda weight: weight.register_hook(lambda gradient: gradient * 2),
    ],
)
def test_each_weight_changed_in_place(change: Callable[[Tensor], object]) -> None:
    plain = small_network()
    step(plain, LR)
    for name, _ in plain.named_parameters():
        network = copy.deepcopy(plain)
        change(network.get_parameter(name))
        compare(network, LR, name, restore=False)


def test_kernel_still_computes_unedited_parts() -> None:
    network = small_network()
    with kernel_calls() as names:
        network(LR)
    assert sorted(names) == ["Depthwise"] * 2 + ["Enlarge"] + ["Mix"] * 4 + ["Project"]
    names.clear()
    replace(network, "blocks.0.net.0.mlp1.fc.1", nn.GELU())
    cast(Any, network.tail).padding_mode = "reflect"
    with kernel_calls() as names:
        network(LR)
    assert sorted(names) == ["Depthwise"] * 2 + ["Mix"] * 3 + ["Project"]
    cast(Any, network.tail).padding_mode = "zeros"
    with kernel_calls() as names:
        network(LR)
    assert "Enlarge" in names  # eligible again


def test_modules_used_twice() -> None:
    """Tied weights: one module in two places, and twice in one sequence."""
    network = small_network(scale=4, mlp_ratio=1)
    layer = network.get_submodule("blocks.0.net.0")
    assert isinstance(layer, ShuffleMixerLayer)
    layer.norm2, layer.mlp2 = layer.norm1, layer.mlp1
    layer.mlp1.fc[2] = layer.mlp1.fc[0]
    for i in range(3):
        network.upsapling[3 + i] = network.upsapling[i]
    with kernel_calls() as names:
        network(LR)
    assert names.count("Mix") == 4
    assert names.count("Enlarge") == 2
    assert not isinstance(compare(network, LR), str)


def test_layers_added_and_removed() -> None:
    for count in (0, 1, 3):
        network = small_network()
        block = network.get_submodule("blocks.0")
        assert isinstance(block, FeatureMixingBlock)
        block.net = nn.Sequential(*(ShuffleMixerLayer(network.config) for _ in range(count)))
        assert not isinstance(compare(network, LR, str(count)), str)
        network.blocks.append(nn.Identity())
        assert not isinstance(compare(network, LR, str(count)), str)


def test_single_layers_in_any_memory_format() -> None:
    network = small_network()
    x = torch.randn(2, 32, 5, 6, generator=torch.Generator().manual_seed(4))
    for name in ("blocks.0", "blocks.0.net.0", "blocks.0.net"):
        module = network.get_submodule(name)
        for view in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT, x[:1].expand_as(x)):
            assert not isinstance(compare(module, view, name), str)
        negative = torch.complex(torch.zeros_like(x), x).conj().imag
        assert negative.is_neg()
        with torch.no_grad():
            got = module(negative)
            with kernel_off():
                torch.testing.assert_close(got, module(negative), rtol=1e-4, atol=1e-4)


def test_too_many_features_for_the_kernel() -> None:
    assert not mixing_kernel.why_not(torch.empty(1, mixing_kernel.MAX_CHANNELS, 1, 1))
    assert "multiples of 32 up to 2048" in mixing_kernel.why_not(torch.empty(1, mixing_kernel.MAX_CHANNELS + 32, 1, 1))
    assert mixing_kernel.extension.MOST_CHANNELS == mixing_kernel.MAX_CHANNELS


@pytest.mark.parametrize("active", [False, True])
def test_dropout_and_activation_checkpointing_agree(active: bool) -> None:
    """Blocks recomputed in the backward pass draw the same random numbers."""
    results = []
    for checkpointing in (False, True):
        network = small_network()
        network.blocks.append(nn.Sequential(nn.Dropout(0.5), nn.Conv2d(32, 32, 1), nn.Dropout(0.5)))
        network.activation_checkpointing = checkpointing
        if active:
            network.blocks.register_forward_hook(lambda module, inputs, output: output * 2)
        results.append(step(network, LR))
    for one, other in zip(*results, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_blocks_replaced_by_any_module() -> None:
    for new in (nn.Identity(), Wrapped(nn.Identity()), nn.Conv2d(32, 32, 3, padding=1)):
        for checkpointing in (False, True):
            network = small_network()
            network.activation_checkpointing = checkpointing
            network.blocks = cast(nn.Sequential, new)
            assert not isinstance(compare(network, LR), str)


class Own(ShuffleMixer):
    """A user's subclass of the network."""

    def upsample(self, x: Tensor) -> Tensor:
        return super().upsample(x * 0.5)


def test_overridden_methods_run() -> None:
    torch.manual_seed(0)
    network = Own(32, 3, 1, 2, 2)
    assert not isinstance(compare(network, LR), str)
    with torch.no_grad():
        x = torch.randn(1, 32, 4, 4)
        assert torch.equal(network.upsample(x), ShuffleMixer.upsample(network, x * 0.5))


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        *((PointMlp, "forward"), (ChannelNorm, "forward"), (nn.SiLU, "forward"), (nn.Conv2d, "_conv_forward")),
        *((nn.Module, "__call__"), (nn.Sequential, "forward"), (nn.functional, "silu"), (nn.functional, "layer_norm")),
    ],
)
def test_replaced_functions_run(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tools replace functions, to count or rewrite operations."""
    network = small_network()
    step(network, LR)
    before, calls = getattr(owner, name), []

    def other(*arguments: Any, **named: Any) -> Any:
        calls.append(name)
        out = before(*arguments, **named)
        return out * 0.5 if name != "__call__" else out

    monkeypatch.setattr(owner, name, other)
    assert not isinstance(compare(network, LR), str)
    half = len(calls) // 2
    assert half
    assert calls == [name] * 2 * half
    monkeypatch.undo()
    with kernel_calls() as names:
        network(LR)
    assert len(names) == 8
