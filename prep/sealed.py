"""Sealed JSON: one line of JSON and its SHA-256 on the next. Readers refuse it unless the digest matches."""

import hashlib
import json
from typing import Any

from loader.errors import FormatError
from loader.format.strict_json import Fields, load


def seal(value: dict[str, Any]) -> bytes:
    """Return a JSON object as sealed JSON."""
    body = json.dumps(value, ensure_ascii=False).encode()
    return body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n"


def unseal(text: bytes, where: str) -> Fields:
    """Return the fields of a sealed JSON object.

    Raises:
        FormatError: the digest does not match, or the JSON is invalid.
    """
    body, _, digest = text.rstrip(b"\n").rpartition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise FormatError(f"{where}: expected a line of JSON and its SHA-256, got something else")
    return Fields(load(body, where), where)
