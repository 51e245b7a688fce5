"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, then rename: readers, and whoever comes after a kill, see all of it or nothing.

    What was at `path` is replaced. Raises OSError, which names `path`, and leaves nothing behind then.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")  # of a length that fits however long the name is
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
