"""Starting Python processes that import nothing from the working directory."""

import contextlib
import os
from collections.abc import Iterator

_SWITCH = "PYTHONSAFEPATH"


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Keep processes that multiprocessing starts in this context from importing a `random.py` of the user.

    They start as `python -c`, which searches the working directory before the standard library.
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
