"""The optional compiled kernels; everything else is in setup.cfg.

With SRSHARDS_SANITIZE=1 they are built for `make test-sanitized`: each error of memory or arithmetic ends the process.
"""

import hashlib
import os
import sys
from pathlib import Path

from setuptools import Extension, setup

# No fused multiply-add: results must be the same on every machine, and the same as the fallback's.
flags = [] if sys.platform == "win32" else ["-O3", "-std=c11", "-ffp-contract=off"]
# The network's results are torch's up to rounding, and torch fuses as well.
fused = [] if sys.platform == "win32" else ["-O3", "-std=c11", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi"]

sanitized = os.environ.get("SRSHARDS_SANITIZE") == "1"
checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if sanitized else []
if sanitized:
    slow = ["-O1", "-g", "-fno-omit-frame-pointer", *checks]
    flags, fused = flags + slow, fused + slow  # the last -O counts


def kernel(name, flags):
    """Make an extension of the C files that start with its name; it holds their digest (loader.native.source_mark)."""
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
        kernel("loader.pixels._gather", flags),
        kernel("loader.resize._imresize", flags),
        kernel("model.cpu._mixing", fused),
    ]
)
