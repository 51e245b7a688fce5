"""Process-wide state of torch that a compiled kernel would bypass: modes, hooks on all modules, replaced functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_globals

HOOK_DICTS = tuple(f"_global_{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre"))

Snapshot = tuple[tuple[object, str, object], ...]


def active_mode() -> str:
    """Name the mode of torch that must see every operation, such as tracing or counting; "" if none is active."""
    if torch.compiler.is_compiling():
        return "torch is compiling or exporting"
    if torch._C._get_tracing_state():
        return "torch is tracing"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a torch dispatch or function mode is active"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return ""


def global_hooks() -> str:
    """Return a message if hooks are registered on all modules, "" if not."""
    for name in HOOK_DICTS:
        if getattr(module_globals, name):
            return f"torch's {name.strip('_').replace('_', ' ')} are set"
    return ""


def snapshot(*owners: object, names: tuple[str, ...] = ("forward",)) -> Snapshot:
    """Record the functions `names` of `owners` (classes or modules), for `replaced` to compare later."""
    return tuple((owner, name, getattr(owner, name)) for owner in owners for name in names)


def replaced(functions: Snapshot) -> str:
    """Return a message naming the first function that was replaced since its snapshot; "" if none was."""
    for owner, name, function in functions:
        if getattr(owner, name) is not function:
            return f"{getattr(owner, '__name__', owner)}.{name} was replaced"
    return ""


# The code of torch that the network's modules run.
TORCH_FUNCTIONS = (
    *snapshot(nn.Module, names=("__call__", "__getattr__")),
    *snapshot(nn.Conv2d, names=("forward", "_conv_forward")),
    *snapshot(nn.LayerNorm, nn.SiLU, nn.PixelShuffle, nn.Sequential),
    *snapshot(F, names=("conv2d", "layer_norm", "silu", "pixel_shuffle")),
)
