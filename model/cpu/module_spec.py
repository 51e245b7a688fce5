"""Descriptions of modules fresh from their constructors, to detect later edits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Attributes that do not influence what a module computes, or that `ModuleSpec.mismatch` compares separately.
IGNORED: dict[str, Any] = dict.fromkeys(
    [
        *("training", "_parameters", "_modules", "_is_full_backward_hook", "_non_persistent_buffers_set"),
        *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    ]
)
IGNORED_OF: dict[type, dict[str, Any]] = {nn.SiLU: IGNORED | {"inplace": None}}


@dataclass(frozen=True)
class ModuleSpec:
    """The type, attributes, weight shapes and children of a module fresh from its constructor."""

    kind: type[nn.Module]
    ignored: dict[str, Any]
    attributes: dict[str, Any]
    shapes: dict[str, torch.Size | None]
    children: dict[str, ModuleSpec]

    @staticmethod
    def of(module: nn.Module) -> ModuleSpec:
        """Describe `module` and, recursively, its children."""
        ignored = IGNORED_OF.get(type(module), IGNORED)
        return ModuleSpec(
            type(module),
            ignored,
            vars(module) | ignored,
            {name: None if weight is None else weight.shape for name, weight in module._parameters.items()},
            {name: ModuleSpec.of(child) for name, child in module.named_children()},
        )

    def mismatch(self, module: nn.Module, recursive: bool = True) -> str:
        """Return the first difference between `module` and this description, "" if there is none.

        With `recursive` False, children are not compared.
        """
        if type(module) is not self.kind:
            return f": expected {self.kind.__name__}, got {type(module).__name__}"
        attributes = vars(module) | self.ignored
        if attributes != self.attributes:
            return ": " + _attribute_mismatch(attributes, self.attributes)
        parameters, children = module._parameters, module._modules
        if parameters.keys() != self.shapes.keys():
            return f": expected parameters {[*self.shapes]}, got {[*parameters]}"
        for name, shape in self.shapes.items():
            if reason := _weight_mismatch(parameters[name], shape):
                return f".{name}: {reason}"
        if not recursive:
            return ""
        if [*children] != [*self.children]:
            return f": expected modules {[*self.children]}, got {[*children]}"
        for name, spec in self.children.items():
            child = children[name]
            if child is None:
                return f".{name}: expected {spec.kind.__name__}, got None"
            if reason := spec.mismatch(child):
                return f".{name}{reason}"
        return ""


def _attribute_mismatch(got: dict[str, Any], expected: dict[str, Any]) -> str:
    for name in {**expected, **got}:
        if name not in got or name not in expected:
            return f"attribute {name} was {'added' if name in got else 'removed'}"
        if got[name] != expected[name]:
            if name.endswith("_hooks"):
                return f"has {name.strip('_').replace('_', ' ')}"
            return f"expected {name} {expected[name]!r}, got {got[name]!r}"
    return "differs"


def _weight_mismatch(weight: Tensor | None, shape: torch.Size | None) -> str:
    if weight is None or shape is None:
        return "" if weight is None and shape is None else f"expected shape {shape}, got {weight}"
    if type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return f"expected a Parameter or Tensor, got a {type(weight).__name__}"
    if weight.shape != shape:
        return f"expected shape {tuple(shape)}, got {tuple(weight.shape)}"
    if weight.dtype is not torch.float32 or not weight.is_cpu or weight.layout is not torch.strided:
        return f"expected float32 on the CPU, got {weight.dtype} on {weight.device}"
    return ""
