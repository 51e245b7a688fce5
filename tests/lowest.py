"""Print the lowest declared versions, as constraints for pip: `python tests/lowest.py`.

They are read from setup.cfg. Torch and its dependencies stay at the versions in constraints.txt: other builds are
gigabytes.
"""

from __future__ import annotations

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTRAS = ("test", "export")
OF_TORCH = ("filelock", "fsspec", "jinja2", "mpmath", "networkx", "setuptools", "sympy", "torch", "typing_extensions")
TOOLS = ("mypy", "ruff")  # not run with the lowest versions


def declared(setup: Path = ROOT / "setup.cfg") -> dict[str, str]:
    """Return the lowest declared version of each requirement, by name.

    Raises:
        ValueError: a requirement is not of the form `name>=version`.
    """
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(setup, encoding="utf-8")
    options, extras = parser["options"], parser["options.extras_require"]
    lines = [line for text in (options["install_requires"], *map(extras.get, EXTRAS)) for line in (text or "").split()]
    found: dict[str, str] = {}
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9][0-9a-z.]*)", line)
        if match is None or found.get(match[1], match[2]) != match[2]:
            raise ValueError(f"{setup}: expected name>=version, the same in all places, got {line}")
        found[match[1]] = match[2]
    return found


def pins() -> list[str]:
    """Return the lines of the constraints file."""
    lowest = {name: version for name, version in declared().items() if name not in (*TOOLS, "torch")}
    fixed = [
        line
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line.partition("==")[0].lower() in OF_TORCH
    ]
    return [*(f"{name}=={version}" for name, version in lowest.items()), *fixed]


if __name__ == "__main__":
    print("\n".join(pins()))
