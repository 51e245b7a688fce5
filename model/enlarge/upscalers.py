"""Upscalers: functions from uint8 (H, W, 3) to (H·s, W·s, 3), by MATLAB's bicubic or a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from loader.errors import ShardsError
from loader.resize.imresize import enlarge
from model.enlarge.self_ensemble import self_ensembled
from model.enlarge.tile_size import automatic_tiling
from model.enlarge.tiles import Forward, TileProgress, Tiling, enlarge_in_tiles
from model.metrics import Image
from model.shufflemixer import ShuffleMixer

Upscaler = Callable[[Image], Image]


class NonFiniteError(ShardsError):
    """NaN or infinity in the output of a network."""


def bicubic_upscaler(scale: int) -> Upscaler:
    """Return an upscaler by MATLAB's bicubic."""
    return lambda lr: enlarge(lr, scale)


def network_upscaler(
    network: nn.Module,
    device: torch.device,
    *,
    tiling: Tiling | Literal["auto"] | None = None,
    self_ensemble: bool = False,
    progress: TileProgress = lambda tiles: tiles,
) -> Upscaler:
    """Return an upscaler by `network`, whose output is clamped to [0, 1] and rounded to uint8.

    Args:
        network: maps float32 (N, 3, H, W) in [0, 1] to (N, 3, H·s, W·s).
        device: the network's device.
        tiling: None enlarges images as a whole; "auto" (ShuffleMixer only) in tiles if they exceed the memory budget.
        self_ensemble: average over the 8 flips and quarter turns, before rounding; 8 times slower.
        progress: an iterator over the tiles of an image, such as a progress bar.

    The upscaler raises NonFiniteError if the network's output has NaN or infinity.
    """
    if tiling == "auto" and not isinstance(network, ShuffleMixer):
        raise ValueError(f"automatic tiling needs a ShuffleMixer, got {type(network).__name__}")

    def to_device(pixels: Tensor) -> Tensor:
        result: Tensor = network(pixels.to(device).float() / 255)
        return result

    forward: Forward = self_ensembled(to_device) if self_ensemble else to_device

    def upscale(lr: Image) -> Image:
        pixels = torch.from_numpy(np.ascontiguousarray(lr)).permute(2, 0, 1).unsqueeze(0)
        tiles = tiling
        if tiles == "auto":
            assert isinstance(network, ShuffleMixer)
            tiles = automatic_tiling(network, *lr.shape[:2])
        training = network.training
        network.eval()
        try:
            with torch.inference_mode():
                sr = enlarge_in_tiles(forward, pixels, tiles, _to_bytes, progress)
        finally:
            network.train(training)
        return np.ascontiguousarray(sr[0].permute(1, 2, 0).numpy())

    return upscale


def _to_bytes(sr: Tensor) -> Tensor:
    low, high = sr.aminmax()  # both NaN if any value is
    if not (low.isfinite() and high.isfinite()):
        raise NonFiniteError("expected finite output from the network, got NaN or infinity")
    return sr.float().clamp(0, 1).mul(255).round().byte().cpu()
