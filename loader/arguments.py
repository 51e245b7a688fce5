"""Checks of arguments; errors name the argument, what was expected and what was got."""

import operator
import os
from pathlib import Path

from loader.errors import ShardsError, one_line


def whole(name: str, value: object, low: int | None, high: int | None = None) -> int:
    """Return a whole number from low to high as int.

    NumPy integers and 0-d integer tensors count as whole numbers (`operator.index`); floats, text and booleans do not.

    Args:
        name: name of the argument, for messages.
        value: its value.
        low, high: bounds, both inclusive; None: no bound.

    Raises:
        TypeError: the value is not a whole number.
        ValueError: the value is out of range.
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
    """Return a whole number as int; None for anything else: a boolean, a float, text, an array of one element."""
    kind = str(getattr(value, "dtype", ""))
    if isinstance(value, bool) or kind.endswith("bool") or getattr(value, "ndim", 0) != 0:
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # torch raises any of these
        return None


def flag(name: str, value: object) -> bool:
    """Return a boolean argument; raise TypeError for anything else."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")
    return bool(value)


def folder_path(name: str, value: object) -> Path:
    """Return the path of a folder, which need not exist.

    Raises:
        TypeError: the argument is not a path.
        ShardsError: the path is empty, as from an unset shell variable; it would mean the working directory.
    """
    try:
        text = os.fsdecode(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected the path of a folder, got {describe(value)}") from None
    if text == "" or "\0" in text:
        raise ShardsError(f"{name}: expected the path of a folder, got {describe(value)}")
    return Path(text)


def require(name: str, expected: str, got: object, holds: bool) -> None:
    """Raise ValueError about an argument unless `holds`."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {describe(got)}")


def describe(value: object) -> str:
    """Return a value's repr as one short line for messages, with its type if the repr does not show it."""
    kind = type(value).__name__
    try:
        text = repr(value)
    except Exception:
        text = "…"
    if len(text) > 80:
        text = text[:77] + "…"
    plain = value is None or isinstance(value, bool | int | float | str) or kind.lower() in text.lower()
    return one_line(text if plain else f"{kind} {text}")
