"""The project's modules, and what they import."""

import ast
from pathlib import Path

from helpers import ROOT


def modules() -> dict[str, Path]:
    """Return the files of all modules by dotted name; a package's is its `__init__.py`."""
    paths = [ROOT / "train.py", ROOT / "srshards_names.py"]
    paths += [path for package in ("loader", "prep", "model") for path in sorted((ROOT / package).rglob("*.py"))]
    names = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imports(path: Path) -> set[str]:
    """Return the full names that a file imports; `from a import b` counts as a.b if that is our module, else as a."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules())
            names |= inner or {str(node.module)}
    return names
