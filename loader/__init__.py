"""Datasets and loaders over shards: aligned random crops and whole images, without decoding."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loader.batches import PatchLoader as PatchLoader
    from loader.batches import to_float as to_float
    from loader.dataset import ImageDataset as ImageDataset
    from loader.dataset import PatchDataset as PatchDataset
    from loader.errors import FormatError as FormatError
    from loader.errors import ShardsError as ShardsError
    from loader.plan import Crop as Crop
    from loader.stream.iterator import PatchIterator as PatchIterator
    from loader.stream.stats import Stats as Stats

_HOMES = {
    "PatchLoader": "loader.batches",
    "to_float": "loader.batches",
    "Crop": "loader.plan",
    "ImageDataset": "loader.dataset",
    "PatchDataset": "loader.dataset",
    "FormatError": "loader.errors",
    "ShardsError": "loader.errors",
    "PatchIterator": "loader.stream.iterator",
    "Stats": "loader.stream.stats",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that tools that only need the format do not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
