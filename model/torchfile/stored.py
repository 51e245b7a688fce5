"""Descriptions of tensors in a `torch.save` file, made before any value is read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Storage:
    """A flat run of values: the record of the archive that holds them, their dtype and number."""

    key: str
    dtype: torch.dtype
    elements: int

    @property
    def nbytes(self) -> int:
        """Size of the record in bytes."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that has not been read; `offset` and `stride` count elements. All its values lie within its storage.

    It has no more elements than its storage, so it is never an expansion of a few bytes.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its values."""
        return self.storage.dtype

    @property
    def nbytes(self) -> int:
        """Size of a contiguous copy in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize
