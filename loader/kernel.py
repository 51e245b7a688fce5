"""The compiled kernels: optional C extensions, each beside the module whose hot loop it is."""

import importlib
import os
from typing import Any

SWITCH = "SRSHARDS_KERNELS"  # set to 0, it leaves the compiled kernels aside


def compiled(name: str) -> Any:
    """The extension module of that name, or None where it was not built or is switched off."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
