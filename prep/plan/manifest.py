"""The manifest: everything that identifies a build, apart from the pixels of its sources.

An unfinished build keeps its manifest in its folder. A build resumes only what has the same manifest.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import h5py

from loader.errors import one_line
from loader.format import layout as fmt
from loader.format.layout import LrOrigin
from loader.format.strict_json import Fields, fail
from prep import __version__
from prep.sealed import seal, unseal

MADE_BY = f"srshards {__version__}"
LABELS = {"container": "format", "scales": "scale", "tile": "tile", "images_per_shard": "images per shard", "lr": "LR"}
VERSION_LABELS = {"made_by": "made by", "libraries": "made with"}
MAX_TEXT = 4096  # characters of a field
MOST = 1 << 62
NAMED = 5  # file names listed for each difference in sources
SHOWN = 200  # characters shown of a name or value


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What identifies a build.

    `libraries` are the versions of those that decode images and write shards, by name. `lr` describes how LR is made.
    `sources` lists the source files of each plane that has some, in order.
    """

    made_by: str
    libraries: dict[str, str]
    container: str
    scales: list[int]
    tile: int
    images_per_shard: int
    lr: str
    sources: dict[str, list[str]]

    @cached_property
    def sha256(self) -> str:
        """The digest by which records name their build."""
        return hashlib.sha256(json.dumps(self._facts(), sort_keys=True).encode()).hexdigest()

    def dump(self) -> bytes:
        """Return the content of a manifest file."""
        return seal(self._facts())

    @classmethod
    def parse(cls, text: bytes, where: str) -> "Manifest":
        """Return the manifest in the content of a file.

        Raises:
            FormatError: it is damaged or malformed.
        """
        fields = unseal(text, where)
        sources = fields.object("sources")
        planes = [fmt.plane_name(level) for level in (fmt.HR, *fmt.SCALES)]
        manifest = cls(
            made_by=_short(fields, "made_by"),
            libraries=_libraries(fields),
            container=_short(fields, "container"),
            scales=_scales(fields.take("scales", list), where),
            tile=fields.integer("tile", *fmt.TILES),
            images_per_shard=fields.integer("images_per_shard", 1, MOST),
            lr=_short(fields, "lr"),
            sources={plane: sources.strings(plane) for plane in planes if plane in sources},
        )
        sources.done()
        fields.done()
        return manifest

    def _facts(self) -> dict[str, Any]:
        return {
            "made_by": self.made_by,
            "libraries": self.libraries,
            "container": self.container,
            "scales": self.scales,
            "tile": self.tile,
            "images_per_shard": self.images_per_shard,
            "lr": self.lr,
            "sources": self.sources,
        }


def libraries(container: str) -> dict[str, str]:
    """Return the versions of the libraries that a dataset's bytes depend on, by name."""
    return ({"HDF5": h5py.version.hdf5_version} if container == "hdf5" else {}) | {"OpenCV": cv2.__version__}


def lr_text(origin: LrOrigin) -> str:
    """Return the manifest's `lr` field for an origin of LR."""
    return f"{origin.resize} with {origin.border} border" if origin.made == "imresize" else origin.made


def differences(asked: Manifest, found: Manifest, *, versions: bool) -> list[str]:
    """Return the differences between two manifests, one line each; with `versions`, also of program and libraries."""
    labels = LABELS | (VERSION_LABELS if versions else {})
    if asked.container != found.container:
        labels.pop("libraries", None)  # they differ with the container
    lines = [
        f"{label}: found {_text(getattr(found, key))}; requested {_text(getattr(asked, key))}"
        for key, label in labels.items()
        if getattr(found, key) != getattr(asked, key)
    ]
    for plane in asked.sources.keys() & found.sources.keys():
        old, new = set(found.sources[plane]), set(asked.sources[plane])
        lines += [
            f"{plane} sources: {len(names)} {change} ({', '.join(_first(sorted(names)))})"
            for change, names in (("added", new - old), ("removed", old - new))
            if names
        ]
    return lines


def _first(names: list[str]) -> list[str]:
    return [*map(_text, names[:NAMED]), *(["…"] if len(names) > NAMED else [])]


def _text(value: Any) -> str:
    """Return a value as one short line: a stranger may have written it."""
    if isinstance(value, dict):
        value = [f"{name} {version}" for name, version in value.items()]
    text = ", ".join(map(str, value[:NAMED])) or "none" if isinstance(value, list) else str(value)
    return one_line(text if len(text) <= SHOWN else text[:SHOWN] + "…")


def _scales(values: list[Any], where: str) -> list[int]:
    if any(type(value) is not int or value not in fmt.SCALES for value in values):
        fail(where, "scales", f"some of {fmt.SCALES}", "others")
    return values


def _libraries(fields: Fields) -> dict[str, str]:
    versions = fields.texts("libraries")
    if any(len(text) > MAX_TEXT for item in versions.items() for text in item):
        fail(fields.where, "libraries", f"at most {MAX_TEXT} characters each", "more")
    return versions


def _short(fields: Fields, key: str) -> str:
    text = fields.text(key)
    if len(text) > MAX_TEXT:
        fail(fields.where, key, f"at most {MAX_TEXT} characters", len(text))
    return text
