"""Loading of the optional C extensions, each next to the module that it speeds up."""

import hashlib
import importlib
import os
import warnings
from pathlib import Path
from typing import Any

SWITCH = "SRSHARDS_KERNELS"  # environment variable; 0 disables all C extensions


def compiled(name: str) -> Any:
    """Return the C extension of that name, or None if it was not built, or is disabled.

    An extension built from other sources than those next to it (an older checkout) may expect other arguments. It is
    ignored, with a RuntimeWarning.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    if _is_stale(Path(str(module.__file__))):
        warnings.warn(
            f"{module.__file__}: expected a C extension built from the sources next to it, got one of other "
            "sources; ignored until it is rebuilt (make, or pip install -e .)",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return module


def source_mark(folder: Path, stem: str) -> bytes:
    """Return the mark in an extension built from the C files `stem*` in `folder`; b"" if there are no such files."""
    digest, paths = hashlib.sha256(), sorted(folder.glob(f"{stem}*.[ch]"))
    for path in paths:
        digest.update(path.read_bytes())
    return f"srshards-source:{digest.hexdigest()}".encode() if paths else b""


def _is_stale(path: Path) -> bool:
    try:
        return source_mark(path.parent, path.name.partition(".")[0]) not in path.read_bytes()
    except OSError:
        return False
