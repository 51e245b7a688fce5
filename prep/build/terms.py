"""What a command asks a dataset to be, what a folder holds, and in what the two differ."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import h5py

from loader.errors import one_line
from loader.format.layout import HR, Index, LrOrigin, plane_name
from prep import __version__
from prep.shard.shard import Bad, Recipe, ShardPlan

MADE_BY = f"srshards {__version__}"
NAMES = {
    "container": "format",
    "scales": "scale",
    "tile": "tile",
    "images_per_shard": "images per shard",
    "lr": "LR",
}
VERSIONS = {"made_by": "made by", "libraries": "made with"}
NAMED = 5  # so many file names tell which sources differ
SHOWN = 200  # characters of a name or value that are shown


@dataclass(frozen=True)
class Terms:
    """What the bytes of a dataset follow from, apart from the pixels of its sources.

    `libraries` are the versions of those that decode and write; `lr` says how LR is made; `sources` has the names
    of the source files of each plane that has some, in order.
    """

    made_by: str
    libraries: dict[str, str]
    container: str
    scales: list[int]
    tile: int
    images_per_shard: int
    lr: str
    sources: dict[str, list[str]]

    @property
    def sha256(self) -> str:
        """A name for these terms."""
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()


def terms_of(plans: Sequence[ShardPlan]) -> Terms:
    """The terms of a plan."""
    recipe = plans[0].recipe
    sources = [source for plan in plans for source in plan.sources]
    named = {plane_name(HR): [source.image.name for source in sources]}
    if recipe.given_lr:
        named |= {plane_name(scale): [source.lr[scale].name for source in sources] for scale in recipe.scales}
    return Terms(
        MADE_BY,
        libraries(recipe.container),
        recipe.container,
        list(recipe.scales),
        recipe.tile,
        recipe.images_per_shard,
        _lr(lr_origin(recipe)),
        named,
    )


def terms_of_index(index: Index, skipped: Sequence[Bad], plans: Sequence[ShardPlan]) -> Terms:
    """The terms of a complete dataset; `plans` says what skipped images were called."""
    planned = {source.image.stem: source for plan in plans for source in plan.sources}
    gone = [planned[bad.image] for bad in skipped if bad.image in planned]
    lost = [bad.source for bad in skipped if bad.image not in planned]
    sources = {}
    for scale, plane in index.planes.items():
        if plane.source is not None:
            files = [source.lr.get(scale, source.image) for source in gone]
            names = [*plane.source, *(file.name for file in files), *(lost if scale == HR else [])]
            sources[plane_name(scale)] = names
    return Terms(
        index.made_by,
        dict(index.libraries),
        index.container,
        list(index.scales),
        index.planes[HR].tile,
        index.images_per_shard,
        _lr(index.lr),
        sources,
    )


def libraries(container: str) -> dict[str, str]:
    """The versions of the libraries that the bytes of a dataset depend on, by name."""
    return ({"HDF5": h5py.version.hdf5_version} if container == "hdf5" else {}) | {"OpenCV": cv2.__version__}


def lr_origin(recipe: Recipe) -> LrOrigin:
    """How a recipe makes LR."""
    if not recipe.scales:
        return LrOrigin("none")
    return LrOrigin("given") if recipe.given_lr else LrOrigin("imresize", recipe.resize, recipe.border)


def differences(asked: Terms, found: Terms, *, versions: bool) -> list[str]:
    """In what terms differ, a line each; `versions`: also by what program they are."""
    names = NAMES | (VERSIONS if versions else {})
    if asked.container != found.container:
        names.pop("libraries", None)  # they follow from the container
    lines = [
        f"{name}: {_text(getattr(found, key))} there, {_text(getattr(asked, key))} asked for"
        for key, name in names.items()
        if getattr(found, key) != getattr(asked, key)
    ]
    for plane in asked.sources.keys() & found.sources.keys():
        old, new = set(found.sources[plane]), set(asked.sources[plane])
        lines += [
            f"{plane} sources: {len(names)} {what} "
            f"({', '.join(map(_text, sorted(names)[:NAMED]))}{', …' * (len(names) > NAMED)})"
            for what, names in (("added", new - old), ("removed", old - new))
            if names
        ]
    return lines


def _lr(origin: LrOrigin) -> str:
    return f"{origin.resize} with {origin.border} border" if origin.made == "imresize" else origin.made


def _text(value: Any) -> str:
    """A value in one short line: it may be of a file that a stranger wrote."""
    if isinstance(value, dict):
        value = [f"{name} {version}" for name, version in value.items()]
    text = ", ".join(map(str, value[:NAMED])) or "none" if isinstance(value, list) else str(value)
    return one_line(text if len(text) <= SHOWN else text[:SHOWN] + "…")
