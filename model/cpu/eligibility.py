"""Which parts of the network the compiled kernel may compute: those whose modules' code says exactly the same.

Before each use, every module of a part is compared with a fresh one: types, attributes, hooks, methods, shapes of
weights. If anything differs, the modules run as written. Classes can be edited too, so their code is compared once with
the kernel's operations, in float64 on random weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from model.config import ShuffleMixerConfig
from model.cpu import mixing_kernel, operations
from model.cpu.module_spec import ModuleSpec
from model.cpu.torch_state import TORCH_FUNCTIONS, Snapshot, global_hooks, replaced, snapshot

Modules = tuple[nn.Module, ...]
Run = Callable[..., Tensor]  # (function of model.cpu.operations, *arguments): runs the kernel, or the fallback

TOLERANCE = 1e-9  # relative, between code and operations


@dataclass(frozen=True, eq=False)
class KernelPart:
    """A part of the network that the compiled kernel can compute."""

    name: str
    own_classes: tuple[type[nn.Module], ...]  # classes of its modules that torch does not define
    module_names: tuple[str, ...]
    build: Callable[[ShuffleMixerConfig], Modules]  # makes its modules, as the network does
    by_modules: Callable[[Modules, Tensor, Tensor | None], Tensor]  # (modules, x, skip)
    by_kernel: Callable[[Run, Modules, Tensor, Tensor | None], Tensor]  # the same by model.cpu.operations
    why_unsupported: Callable[[ShuffleMixerConfig], str]  # "" if the kernel has it
    takes_skip: bool = False
    own_code: Snapshot = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "own_code", snapshot(*self.own_classes))

    def __call__(self, config: ShuffleMixerConfig, modules: Modules, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Compute the part on `x`, plus `skip`: by the kernel if eligible, else by the modules."""
        if mixing_kernel.why_not(x) or self.why_not(config, modules) or x.shape[1] != config.features:
            return self.by_modules(modules, x, skip)
        if skip is not None and (mixing_kernel.why_not(skip) or skip.shape != x.shape):
            return self.by_modules(modules, x, skip)
        return self.by_kernel(operations.apply, modules, x, skip)

    def why_not(self, config: ShuffleMixerConfig, modules: Modules) -> str:
        """Return why the kernel may not replace `modules`, whatever their input; "" if it may."""
        if reason := global_hooks() or replaced(TORCH_FUNCTIONS) or replaced(self.own_code) or _unknown(self, config):
            return reason
        for (name, spec), module in zip(_specs(self, config).items(), modules, strict=True):
            if reason := spec.mismatch(module):
                return name + reason
        return ""


@cache
def _specs(part: KernelPart, config: ShuffleMixerConfig) -> dict[str, ModuleSpec]:
    with torch.device("meta"):  # draws no weights: torch's random generator must not advance
        modules = part.build(config)
    return {name: ModuleSpec.of(module) for name, module in zip(part.module_names, modules, strict=True)}


@cache
def _unknown(part: KernelPart, config: ShuffleMixerConfig) -> str:
    """Return why the kernel does not compute what this configuration's modules say; "" if it does."""
    if reason := mixing_kernel.why_not_channels(config.features) or part.why_unsupported(config):
        return reason
    found: list[bool] = []
    # In a thread of its own, the caller's modes, saved-tensor hooks and autocast are not active.
    thread = threading.Thread(target=lambda: found.append(_agree(part, config)))
    thread.start()
    thread.join()
    return "" if found == [True] else f"the code of the {part.name} was edited: the kernel computes something else"


def _agree(part: KernelPart, config: ShuffleMixerConfig) -> bool:
    """Compare the modules' code with the kernel's operations: values and gradients, in training and evaluation."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        modules = part.build(config)
    for module in modules:
        module.to_empty(device="cpu").double()
        for weight in module.parameters():
            weight.data.normal_(generator=generator)
    leaves = [weight for module in modules for weight in module.parameters()]
    shape = (2, config.features, 4, 5)
    x, skip = torch.randn((2, *shape), generator=generator, dtype=torch.float64).requires_grad_().unbind()
    skip_or_none = skip if part.takes_skip else None
    for training in (True, False):
        for module in modules:
            module.train(training)
        results = []
        try:
            for out in (
                part.by_modules(modules, x, skip_or_none),
                part.by_kernel(lambda function, *arguments: function.fallback(*arguments), modules, x, skip_or_none),
            ):
                grad_out = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
                results.append([out, *torch.autograd.grad(out, [x, *leaves], grad_out)])
        except Exception:  # edited code may raise anything; let it raise where it is used
            return False
        for got, expected in zip(*results, strict=True):
            if got.shape != expected.shape or not (got - expected).abs().max() <= TOLERANCE * expected.abs().max():
                return False
    return True
