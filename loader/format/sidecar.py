"""Sidecar files: values for each tile of a dataset, kept beside its index and bound to it by digest (see FORMAT.md)."""

import os
import re
from pathlib import Path

from loader.errors import FormatError
from loader.format.strict_json import Fields, load
from loader.system.safefile import open_member

HEADER = 4096  # bytes: a line of JSON, padded with spaces
NAME = re.compile(r"scores-[A-Za-z0-9][A-Za-z0-9_-]{0,63}\.bin")


def sidecars(folder: Path) -> dict[str, str]:
    """Return the sidecars in a folder: file name → SHA-256 of the index that it belongs to.

    Files that merely have such a name, and links out of the folder, are no sidecars.
    """
    names = sorted(path.name for path in folder.iterdir() if NAME.fullmatch(path.name))
    found = {name: _index_of(folder / name) for name in names}
    return {name: digest for name, digest in found.items() if digest}


def _index_of(path: Path) -> str | None:
    try:
        descriptor = open_member(path)
        try:
            header = os.pread(descriptor, HEADER, 0)
        finally:
            os.close(descriptor)
        if len(header) < HEADER or not header.endswith(b"\n"):
            return None
        fields = Fields(load(header, str(path)), str(path))
        fields.equal("format", "srshards-scores")
        return fields.digest("index")
    except (OSError, FormatError):
        return None
