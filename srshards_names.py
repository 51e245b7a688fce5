"""Our commands check that `loader` and `prep` are ours too: a user's own folders may have such common names.

This module has an uncommon name, so that Python finds it even if another `loader` or `prep` shadows ours.
"""

import importlib.util
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent


def check_names(package: str, *others: str) -> None:
    """Exit with one line if a command of `package` is starting, and Python finds a package of `others` elsewhere.

    Programs that merely import `package` are not checked: they may use a part of it that needs no other.
    """
    if not _is_starting(package):
        return
    for name in others:
        found = _place(name)
        if found != HOME / name:
            text = (
                f"expected the package {name} of srshards, {HOME / name}, got {found or 'none'}; start from another "
                "folder, or remove that one from Python's path (PYTHONPATH; the working directory: python -P)"
            )
            raise SystemExit(f"Error: {text if text.isprintable() else ascii(text)}")


def _is_starting(package: str) -> bool:
    """Return whether this process runs the script of that name, or a module of that package with `python -m`."""
    if sys.argv[0] != "-m":
        return Path(sys.argv[0]).name == package
    after = sys.orig_argv.index("-m") + 1 if "-m" in sys.orig_argv else len(sys.orig_argv)
    return [word.partition(".")[0] for word in sys.orig_argv[after : after + 1]] == [package]


def _place(name: str) -> Path | None:
    """Return where Python finds a package or module of that name."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # ValueError: a module without a spec
        return None
    places = [] if spec is None else [*(spec.submodule_search_locations or ()), spec.origin]
    return Path(places[0]).resolve() if places and places[0] else None
