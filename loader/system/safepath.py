"""Python processes that take nothing from the working directory."""

import contextlib
import os
from collections.abc import Iterator

_SWITCH = "PYTHONSAFEPATH"


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Start processes of multiprocessing here: a user's `random.py` is not taken for the standard library's.

    They begin as `python -c`, which looks for modules in the working directory first.
    """
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before
