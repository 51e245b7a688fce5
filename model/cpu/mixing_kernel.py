"""The compiled mixing kernel, the C extension `_mixing`: loading it, and which tensors it takes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loader.native import SWITCH, compiled
from model.cpu.torch_state import active_mode

LANES = 16  # floats in the longest vectors: sides of the kernel's matrices are multiples of it
KERNEL_SIZES = (3, 5, 7)  # of depth-wise convolutions
MAX_CHANNELS = 2048  # the kernel keeps a pixel's channels on the stack
MAX_THREADS = 1024


def start(lanes: int = LANES) -> Any:
    """Return the C extension, set to torch's own threads and vectors of up to `lanes` floats; None if unusable."""
    module = compiled("model.cpu._mixing")
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return module if module is not None and module.start(str(path), lanes) else None
    except TypeError:  # built from another version of the source
        return None


extension = start()  # None: everything falls back to torch's operations


def why_missing() -> str:
    """Return why there is no kernel; "" if there is one."""
    if extension is not None:
        return ""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 switches the compiled kernel off"
    if compiled("model.cpu._mixing") is None:
        return "the compiled kernel model.cpu._mixing is not built"
    return "the compiled kernel needs a processor with AVX2 and FMA, torch's OpenMP, and to be built from this source"


def why_not(x: Tensor) -> str:
    """Return why the kernel cannot take `x` in the current state of torch; "" if it can.

    It takes float32 (N, C, H, W) on the CPU with C a multiple of 32, while no mode and no autocast is active.
    """
    if extension is None:
        return why_missing() or "the compiled kernel is switched off"
    if reason := active_mode():
        return reason
    if type(x) is not Tensor:
        return f"the input is a {type(x).__name__}"
    if not x.is_cpu or x.dtype is not torch.float32 or x.layout is not torch.strided:
        return f"the input is {x.dtype} on {x.device}; the compiled kernel takes float32 on the CPU"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is enabled"
    if x.dim() != 4 or not x.numel() or x._is_zerotensor():
        return f"the input is not a non-empty (N, C, H, W): shape {tuple(x.shape)}"
    return why_not_channels(x.shape[1])


def why_not_channels(channels: int) -> str:
    """Return why the kernel cannot work on that number of channels; "" if it can."""
    if channels % (2 * LANES) or channels > MAX_CHANNELS:
        return f"{channels} features; the compiled kernel takes multiples of {2 * LANES} up to {MAX_CHANNELS}"
    return ""


def usable(x: Tensor) -> bool:
    """Return whether the kernel can take `x` in the current state of torch."""
    return not why_not(x)


def thread_count() -> int:
    """Return how many threads the kernel may use: torch's own number."""
    return min(torch.get_num_threads(), MAX_THREADS)
