"""Check arguments: errors name the argument, what was expected, and what was got."""

import operator
import os
from pathlib import Path

from loader.errors import ShardsError, one_line


def whole(name: str, value: object, low: int | None, high: int | None = None) -> int:
    """Return an argument as int: anything that is a whole number by type (`operator.index`), from low to high.

    NumPy integers and 0-d integer tensors are; floats, text and booleans are not.

    Args:
        name: the argument, for messages.
        value: what the caller gave.
        low, high: bounds, both included; None: no such bound.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is out of range.
    """
    if low is None:
        span = "any" if high is None else f"up to {high}"
    else:
        span = f"{low} or more" if high is None else f"{low} to {high}"
    number = as_integer(value)
    if number is None:
        raise TypeError(f"{name}: expected a whole number, {span}, got {describe(value)}")
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"{name}: expected {span}, got {describe(number)}")
    return number


def as_integer(value: object) -> int | None:
    """Return a whole number as int, or None for what is none: a boolean, a float, text, an array of one element."""
    kind = str(getattr(value, "dtype", ""))
    if isinstance(value, bool) or kind.endswith("bool") or getattr(value, "ndim", 0) != 0:
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # torch raises what it likes
        return None


def flag(name: str, value: object) -> bool:
    """Return an argument that is a boolean; TypeError for anything else."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")
    return bool(value)


def folder_path(name: str, value: object) -> Path:
    """Return an argument that names a folder, which need not be there.

    Raises:
        TypeError: it is no path.
        ShardsError: it is empty, as an unset variable of a shell is: that would be the working directory.
    """
    try:
        text = os.fsdecode(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected the path of a folder, got {describe(value)}") from None
    if text == "" or "\0" in text:
        raise ShardsError(f"{name}: expected the path of a folder, got {describe(value)}")
    return Path(text)


def need(name: str, expected: str, got: object, holds: bool) -> None:
    """Raise ValueError about an argument unless what it needs holds."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {describe(got)}")


def describe(value: object) -> str:
    """Return a value for a message: its repr in one short line, with its type where that does not show."""
    kind = type(value).__name__
    try:
        text = repr(value)
    except Exception:
        text = "…"
    if len(text) > 80:
        text = text[:77] + "…"
    plain = value is None or isinstance(value, bool | int | float | str) or kind.lower() in text.lower()
    return one_line(text if plain else f"{kind} {text}")
