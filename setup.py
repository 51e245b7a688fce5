"""The optional C extensions; everything else is in setup.cfg.

SRSHARDS_SANITIZE=1 builds them for `make test-sanitized`: any memory or arithmetic error aborts the process.
"""

import hashlib
import os
import sys
from pathlib import Path

from setuptools import Extension, setup

# No fused multiply-add: results must be the same on all machines, and equal to those of the Python fallback.
flags = [] if sys.platform == "win32" else ["-O3", "-std=c11", "-ffp-contract=off"]
# The network's results equal torch's only up to rounding, and torch fuses too.
fused = [] if sys.platform == "win32" else ["-O3", "-std=c11", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi"]

sanitized = os.environ.get("SRSHARDS_SANITIZE") == "1"
checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if sanitized else []
if sanitized:
    slow = ["-O1", "-g", "-fno-omit-frame-pointer", *checks]
    flags, fused = flags + slow, fused + slow  # the last -O applies


def extension(name, flags):
    """Return the extension built from the C files `name*`; it contains their digest (loader.native.source_mark)."""
    *rooms, stem = name.split(".")
    folder = "/".join(rooms)
    paths = sorted(Path(folder).glob(f"{stem}*.[ch]"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    return Extension(
        name,
        [f"{folder}/{stem}.c"],
        depends=["setup.py", "loader/native.h", *map(str, paths)],
        define_macros=[("SRSHARDS_SOURCE", f'"srshards-source:{digest}"')],
        extra_compile_args=["-include", "loader/native.h", *flags],
        extra_link_args=checks,
        optional=not sanitized,
    )


setup(
    ext_modules=[
        extension("loader.pixels._gather", flags),
        extension("loader.resize._imresize", flags),
        extension("model.cpu._mixing", fused),
    ]
)
