"""JSON read strictly: each field once and of its exact type, integers only, nothing unknown, errors that tell where."""

import json
import reprlib
from collections import Counter
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from loader.errors import FormatError


def fail(where: str, what: str, expected: object, got: object) -> NoReturn:
    """Raise the FormatError of one record."""
    raise FormatError(f"{where}: {what}: expected {expected}, got {got}")


def load(text: bytes, where: str) -> Any:
    """Parse JSON that may hold neither floats nor a key twice.

    Raises:
        FormatError: also for text that is not UTF-8, or nested too deeply, or with numbers of thousands of digits, or
            too large for memory.
    """

    def no_floats(number: str) -> NoReturn:
        fail(where, "number", "integers only", number[:60])

    def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            double = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            fail(where, "fields", "each key once", f"{double[:60]!a} twice")
        return fields

    try:
        return json.loads(text.decode(), parse_float=no_floats, parse_constant=no_floats, object_pairs_hook=no_doubles)
    except (ValueError, RecursionError, OverflowError, MemoryError) as error:
        got = str(error) or type(error).__name__
        raise FormatError(f"{where}: expected a JSON object in UTF-8, got {got}") from None


class Fields:
    """A JSON object being read: each field is taken once, and `done` holds that none is left."""

    def __init__(self, value: Any, where: str) -> None:
        if type(value) is not dict:
            fail(where, "value", "an object", type(value).__name__)
        self._left: dict[str, Any] = dict(value)
        self.where = where

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str, kind: type) -> Any:
        """The value of a field, which must be there and of exactly that type (True is no integer)."""
        if key not in self._left:
            fail(self.where, key, "this field", "none")
        value = self._left.pop(key)
        if type(value) is not kind:
            fail(self.where, key, kind.__name__, _describe(value))
        return value

    def done(self) -> None:
        """Fail if there are fields that nobody asked for."""
        if self._left:
            fail(self.where, "fields", "no others", ", ".join(ascii(key[:60]) for key in [*self._left][:5]))

    def object(self, key: str) -> "Fields":
        """A field that is an object."""
        return Fields(self.take(key, dict), f"{self.where}: {key}")

    def objects(self, key: str) -> list["Fields"]:
        """A field that is a list of objects."""
        return [Fields(value, f"{self.where}: {key}[{i}]") for i, value in enumerate(self.take(key, list))]

    def equal(self, key: str, expected: str | int) -> None:
        """A field with one allowed value."""
        if (value := self.take(key, type(expected))) != expected:
            fail(self.where, key, repr(expected), _describe(value))

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        """A field with some allowed values."""
        value: str = self.take(key, str)
        if value not in choices:
            fail(self.where, key, f"one of {', '.join(choices)}", _describe(value))
        return value

    def text(self, key: str) -> str:
        """A field that is a string."""
        value = str(self.take(key, str))
        self._need_utf8(key, value)
        return value

    def texts(self, key: str) -> dict[str, str]:
        """A field that is an object of strings, its keys in ascending order."""
        inner = self.object(key)
        texts = {name: inner.text(name) for name in [*inner._left]}
        self._need_utf8(key, "".join(texts))
        if [*texts] != sorted(texts):
            fail(inner.where, "fields", "keys in ascending order", ", ".join(ascii(name[:60]) for name in [*texts][:5]))
        return texts

    def digest(self, key: str) -> str:
        """A field that is a SHA-256."""
        value = self.text(key)
        if not is_digest(value):
            fail(self.where, key, "64 hex digits", _describe(value))
        return value

    def integer(self, key: str, low: int, high: int) -> int:
        """A field that is an integer between low and high, both included."""
        value: int = self.take(key, int)
        if not low <= value <= high:
            fail(self.where, key, f"{low} to {high}", _describe(value))
        return value

    def integers(self, key: str, count: int, low: int, high: int) -> NDArray[np.int64]:
        """A field that is a list of `count` integers between low and high, as int64."""
        values = self._column(key, int, count)
        if min(values, default=low) < low or max(values, default=high) > high:
            i, value = next((i, value) for i, value in enumerate(values) if not low <= value <= high)
            fail(self.where, f"{key}[{i}]", f"{low} to {high}", _describe(value))
        return np.array(values, np.int64)

    def strings(self, key: str, count: int | None = None) -> list[str]:
        """A field that is a list of `count` strings (None: of any number)."""
        values = self._column(key, str, count)
        self._need_utf8(key, "".join(values))
        return values

    def digests(self, key: str, count: int) -> list[str]:
        """A field that is a list of `count` SHA-256."""
        values = self.strings(key, count)
        for i, value in enumerate(values):
            if not is_digest(value):
                fail(self.where, f"{key}[{i}]", "64 hex digits", _describe(value))
        return values

    def _need_utf8(self, key: str, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair: JSON can write it, UTF-8 cannot
            fail(self.where, key, "text that UTF-8 can hold", ascii(error.object[error.start : error.end]))

    def _column(self, key: str, kind: type, count: int | None) -> list[Any]:
        values: list[Any] = self.take(key, list)
        if count is not None and len(values) != count:
            fail(self.where, key, f"{count} entries, one per image", len(values))
        if not set(map(type, values)) <= {kind}:
            i, value = next((i, value) for i, value in enumerate(values) if type(value) is not kind)
            fail(self.where, f"{key}[{i}]", kind.__name__, _describe(value))
        return values


def is_digest(text: str) -> bool:
    """Whether this is a SHA-256 in lower-case hex."""
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _describe(value: object) -> str:
    text = reprlib.repr(value).encode("ascii", "backslashreplace").decode()  # short, whatever it is of
    return f"{type(value).__name__} {text[:60]}"
