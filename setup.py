"""The optional compiled kernels; everything else is in setup.cfg."""

import sys

from setuptools import Extension, setup

# No fused multiply-add: results must be the same on every machine, and the same as the fallback's.
flags = [] if sys.platform == "win32" else ["-O3", "-std=c11", "-ffp-contract=off"]
# The network's results are torch's up to rounding, and torch fuses as well.
fused = [] if sys.platform == "win32" else ["-O3", "-std=c11", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi"]

setup(
    ext_modules=[
        Extension("loader._gather", ["loader/_gather.c"], extra_compile_args=flags, optional=True),
        Extension(
            "model._mixing",
            ["model/_mixing.c"],
            depends=["model/_mixing_parts.h"],
            extra_compile_args=fused,
            optional=True,
        ),
        Extension("prep._imresize", ["prep/_imresize.c"], extra_compile_args=flags, optional=True),
    ]
)
