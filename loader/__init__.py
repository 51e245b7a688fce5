"""Reading shards: aligned random crops and whole images, streamed from memory-mapped files."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loader.dataset import Crop as Crop
    from loader.dataset import ImageDataset as ImageDataset
    from loader.dataset import PatchDataset as PatchDataset
    from loader.format import FormatError as FormatError
    from loader.format import ShardsError as ShardsError

_HOMES = {
    "Crop": "loader.dataset",
    "ImageDataset": "loader.dataset",
    "PatchDataset": "loader.dataset",
    "FormatError": "loader.format",
    "ShardsError": "loader.format",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch stays out of tools that only need the format."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
