"""The optional compiled kernels; everything else is in setup.cfg.

With SRSHARDS_SANITIZE=1 they are built for `make test-sanitized`: each error of memory or arithmetic ends the process.
"""

import os
import sys

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

setup(
    ext_modules=[
        Extension(
            name,
            [source],
            depends=depends,
            extra_compile_args=options,
            extra_link_args=checks,
            optional=not sanitized,
        )
        for name, source, depends, options in [
            ("loader._gather", "loader/_gather.c", [], flags),
            ("model._mixing", "model/_mixing.c", ["model/_mixing_parts.h"], fused),
            ("prep._imresize", "prep/_imresize.c", [], flags),
        ]
    ]
)
