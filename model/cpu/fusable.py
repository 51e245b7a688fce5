"""Decide where the compiled kernel may stand in for modules: only where it computes exactly what their code says.

A `Site` is a computation that the kernel knows, and the modules whose code says it. Before each use, every module of it
is compared with what its class's constructor makes: types, all attributes, hooks, methods, the shapes of weights. Any
difference, whatever it means, has the modules run as written. Since the classes themselves may be edited too, their
code is compared once with the operations that the kernel stands for, in float64, on random weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as globals_of_modules

from model.config import ShuffleMixerConfig
from model.cpu import fused

Modules = tuple[nn.Module, ...]
Run = Callable[..., Tensor]  # computes a function of model.cpu.fused on its arguments, one way or the other

# Attributes without influence on what a module computes, or that are looked at by themselves.
MASKED: dict[str, Any] = dict.fromkeys(
    [
        *("training", "_parameters", "_modules", "_is_full_backward_hook", "_non_persistent_buffers_set"),
        *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    ]
)
MASKED_OF: dict[type, dict[str, Any]] = {nn.SiLU: MASKED | {"inplace": None}}
GLOBAL_HOOKS = tuple(f"_global_{when}_hooks" for when in ("forward", "forward_pre", "backward", "backward_pre"))
TOLERANCE = 1e-9  # of values near 1, in float64

Code = tuple[tuple[object, str, object], ...]


def code_of(*owners: object, names: tuple[str, ...] = ("forward",)) -> Code:
    """Remember functions by their owner and name, for `replaced` to tell whether they are still the same."""
    return tuple((owner, name, getattr(owner, name)) for owner in owners for name in names)


TORCH_CODE = (
    *code_of(nn.Module, names=("__call__", "__getattr__")),
    *code_of(nn.Conv2d, names=("forward", "_conv_forward")),
    *code_of(nn.LayerNorm, nn.SiLU, nn.PixelShuffle, nn.Sequential),
    *code_of(F, names=("conv2d", "layer_norm", "silu", "pixel_shuffle")),
)


def replaced(code: Code) -> str:
    """Name the first function of `code` that is another one now; "" if none is."""
    for owner, name, function in code:
        if getattr(owner, name) is not function:
            return f"{getattr(owner, '__name__', owner)}.{name} was replaced"
    return ""


@dataclass(frozen=True)
class Like:
    """What a module and those in it must be, to the last attribute, to count as made by its constructor."""

    kind: type[nn.Module]
    masked: dict[str, Any]
    attributes: dict[str, Any]
    shapes: dict[str, torch.Size | None]
    children: dict[str, Like]

    @staticmethod
    def of(module: nn.Module) -> Like:
        """Describe a module."""
        masked = MASKED_OF.get(type(module), MASKED)
        return Like(
            type(module),
            masked,
            vars(module) | masked,
            {name: None if weight is None else weight.shape for name, weight in module._parameters.items()},
            {name: Like.of(child) for name, child in module.named_children()},
        )

    def why_not(self, module: nn.Module, deep: bool = True) -> str:
        """Say in what `module` differs, "" if in nothing; with `deep` False, of itself only, not of modules in it."""
        if type(module) is not self.kind:
            return f": expected {self.kind.__name__}, got {type(module).__name__}"
        attributes = vars(module) | self.masked
        if attributes != self.attributes:
            return ": " + _first_difference(attributes, self.attributes)
        parameters, children = module._parameters, module._modules
        if parameters.keys() != self.shapes.keys():
            return f": expected parameters {[*self.shapes]}, got {[*parameters]}"
        for name, shape in self.shapes.items():
            if reason := _why_not_weight(parameters[name], shape):
                return f".{name}: {reason}"
        if not deep:
            return ""
        if [*children] != [*self.children]:
            return f": expected modules {[*self.children]}, got {[*children]}"
        for name, like in self.children.items():
            child = children[name]
            if child is None:
                return f".{name}: expected {like.kind.__name__}, got None"
            if reason := like.why_not(child):
                return f".{name}{reason}"
        return ""


def _first_difference(got: dict[str, Any], expected: dict[str, Any]) -> str:
    for name in {**expected, **got}:
        if name not in got or name not in expected:
            return f"attribute {name} was {'added' if name in got else 'removed'}"
        if got[name] != expected[name]:
            if name.endswith("_hooks"):
                return f"has {name.strip('_').replace('_', ' ')}"
            return f"expected {name} {expected[name]!r}, got {got[name]!r}"
    return "differs"


def _why_not_weight(weight: Tensor | None, shape: torch.Size | None) -> str:
    if weight is None or shape is None:
        return "" if weight is None and shape is None else f"expected shape {shape}, got {weight}"
    if type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return f"is a {type(weight).__name__}"
    if weight.shape != shape:
        return f"expected shape {tuple(shape)}, got {tuple(weight.shape)}"
    if weight.dtype is not torch.float32 or not weight.is_cpu or weight.layout is not torch.strided:
        return f"is {weight.dtype} on {weight.device}"
    return ""


def hooked() -> str:
    """Say whether hooks on all modules are set; "" if not."""
    for name in GLOBAL_HOOKS:
        if getattr(globals_of_modules, name):
            return f"torch's {name.strip('_').replace('_', ' ')} are set"
    return ""


@dataclass(frozen=True, eq=False)
class Site:
    """A computation that the compiled kernel knows, for networks of a configuration.

    `build` makes its modules as the network's constructors do, `plain(modules, x, skip)` computes it by them as
    written, `fast(run, modules, x, skip)` by `run(function of model.cpu.fused, *arguments)`, and `lacks` says why the
    kernel does not know a configuration, "" if it does.
    """

    name: str
    kinds: tuple[type[nn.Module], ...]  # our classes among its modules
    names: tuple[str, ...]  # of its modules
    build: Callable[[ShuffleMixerConfig], Modules]
    plain: Callable[[Modules, Tensor, Tensor | None], Tensor]
    fast: Callable[[Run, Modules, Tensor, Tensor | None], Tensor]
    lacks: Callable[[ShuffleMixerConfig], str]
    skips: bool = False  # whether it takes a skip
    code: Code = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "code", code_of(*self.kinds))

    def __call__(self, config: ShuffleMixerConfig, modules: Modules, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Compute it: on the kernel where that is exactly the same, else by the modules as they are."""
        if fused.why_not(x) or self.why_not(config, modules) or x.shape[1] != config.features:
            return self.plain(modules, x, skip)
        if skip is not None and (fused.why_not(skip) or skip.shape != x.shape):
            return self.plain(modules, x, skip)
        return self.fast(fused.apply, modules, x, skip)

    def why_not(self, config: ShuffleMixerConfig, modules: Modules) -> str:
        """Say why the kernel may not stand in for these modules, whatever their input; "" if it may."""
        if reason := hooked() or replaced(TORCH_CODE) or replaced(self.code) or _unknown(self, config):
            return reason
        for (name, like), module in zip(_likes(self, config).items(), modules, strict=True):
            if reason := like.why_not(module):
                return name + reason
        return ""


@cache
def _likes(site: Site, config: ShuffleMixerConfig) -> dict[str, Like]:
    with torch.device("meta"):  # where nothing is drawn: torch's generator must stay as it is
        return {name: Like.of(module) for name, module in zip(site.names, site.build(config), strict=True)}


@cache
def _unknown(site: Site, config: ShuffleMixerConfig) -> str:
    """Say why the kernel does not know what this configuration's modules compute; "" if it does."""
    if reason := fused.why_not_channels(config.features) or site.lacks(config):
        return reason
    found: list[bool] = []
    # In a thread of its own no mode, no hook on saved tensors and no autocast of the caller's is at work.
    thread = threading.Thread(target=lambda: found.append(_agree(site, config)))
    thread.start()
    thread.join()
    return "" if found == [True] else f"the code of the {site.name} was edited: the kernel computes something else"


def _agree(site: Site, config: ShuffleMixerConfig) -> bool:
    """Compare the code with the kernel's operations: values and gradients, in training and in evaluation."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        modules = site.build(config)
    for module in modules:
        module.to_empty(device="cpu").double()
        for weight in module.parameters():
            weight.data.normal_(generator=generator)
    leaves = [weight for module in modules for weight in module.parameters()]
    shape = (2, config.features, 4, 5)
    x, skip = torch.randn((2, *shape), generator=generator, dtype=torch.float64).requires_grad_().unbind()
    skip_or_none = skip if site.skips else None
    for training in (True, False):
        for module in modules:
            module.train(training)
        results = []
        try:
            for out in (
                site.plain(modules, x, skip_or_none),
                site.fast(lambda function, *arguments: function.plain(*arguments), modules, x, skip_or_none),
            ):
                slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
                results.append([out, *torch.autograd.grad(out, [x, *leaves], slope)])
        except Exception:  # whatever edited code may raise here: then it is for that code to run
            return False
        for got, expected in zip(*results, strict=True):
            if got.shape != expected.shape or not (got - expected).abs().max() <= TOLERANCE * expected.abs().max():
                return False
    return True
