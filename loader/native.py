"""The compiled kernels: optional C extensions, each beside the module whose hot loop it is."""

import hashlib
import importlib
import os
import warnings
from pathlib import Path
from typing import Any

SWITCH = "SRSHARDS_KERNELS"  # set to 0, it leaves the compiled kernels aside


def compiled(name: str) -> Any:
    """Return the extension module of that name, or None where it was not built or is switched off.

    One that was built from other sources than those beside it (a checkout that moved on) would be called with arguments
    that it does not expect. It is left aside, with a RuntimeWarning.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    if _is_stale(Path(str(module.__file__))):
        warnings.warn(
            f"{module.__file__}: expected a kernel built from the sources beside it, got one of others; left aside "
            "until it is built again (make, or pip install -e .)",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return module


def source_mark(folder: Path, stem: str) -> bytes:
    """Return what a kernel built from the C files of that stem in `folder` holds; nothing where there are none."""
    digest, paths = hashlib.sha256(), sorted(folder.glob(f"{stem}*.[ch]"))
    for path in paths:
        digest.update(path.read_bytes())
    return f"srshards-source:{digest.hexdigest()}".encode() if paths else b""


def _is_stale(path: Path) -> bool:
    try:
        return source_mark(path.parent, path.name.partition(".")[0]) not in path.read_bytes()
    except OSError:
        return False
