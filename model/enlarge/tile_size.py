"""Tile sizes that keep a network's forward pass within a memory budget."""

from __future__ import annotations

import math

from model.enlarge.receptive_field import receptive_radius
from model.enlarge.tiles import Tiling
from model.shufflemixer import ShuffleMixer

# At its peak, a float32 forward pass holds 2.2 to 5.2 times the features at HR size (tiny and base, ×2 to ×4, on the
# CPU without the compiled kernel; a quarter to half of that with it).
FEATURE_COPIES = 6
MEMORY_BUDGET = 2 << 30  # bytes for a tile and its margins
MIN_TILE = 64  # LR pixels along a side; smaller tiles would spend most of their time on margins


def forward_bytes_per_pixel(network: ShuffleMixer) -> int:
    """Return an upper bound on the bytes that a float32 forward pass needs per LR pixel."""
    return network.config.features * network.config.scale**2 * 4 * FEATURE_COPIES


def automatic_tiling(network: ShuffleMixer, height: int, width: int) -> Tiling | None:
    """Return tiles within MEMORY_BUDGET for an image of `height` x `width` LR pixels; None to enlarge it as a whole.

    None if the whole image is within the budget, or if the network's receptive radius is unknown: its tiles might
    differ from the whole.
    """
    pixels = MEMORY_BUDGET // forward_bytes_per_pixel(network)
    if height * width <= pixels:
        return None
    overlap = receptive_radius(network)
    return None if overlap is None else Tiling(max(MIN_TILE, math.isqrt(pixels) - 2 * overlap), overlap)
