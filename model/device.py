"""The device that a command computes on, and its out-of-memory errors."""

import click
import torch


def pick_device(name: str) -> torch.device:
    """Return the device named `name`; "auto" selects CUDA if available.

    Raises click.BadParameter for a device that does not exist or cannot compute.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        (torch.zeros(1, device=device) + 1).item()  # "meta" has no memory to compute with
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:  # builds without CUDA assert
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise click.BadParameter(f"cannot use {name!r}: {reason}", param_hint="'--device'") from error
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of memory, on a GPU or on the CPU, where torch raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    signs = ("DefaultCPUAllocator: ", "CUDA out of memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
