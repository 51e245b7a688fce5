"""What enlarges an image: MATLAB's bicubic, or a network, as a function from uint8 (H, W, 3) to (H·s, W·s, 3)."""

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
    """A network whose result is no image."""


def bicubic_upscaler(scale: int) -> Upscaler:
    """Enlarge by MATLAB's bicubic."""
    return lambda lr: enlarge(lr, scale)


def network_upscaler(
    network: nn.Module,
    device: torch.device,
    *,
    tiling: Tiling | Literal["auto"] | None = None,
    self_ensemble: bool = False,
    progress: TileProgress = lambda tiles: tiles,
) -> Upscaler:
    """Enlarge by `network`, which must be on `device`; its output is clamped and rounded to uint8.

    Args:
        network: float (N, 3, H, W) in [0, 1] to (N, 3, H·s, W·s).
        device: where it is.
        tiling: None enlarges the image as a whole; "auto", for a ShuffleMixer, tile by tile where it is too large.
        self_ensemble: average over the 8 flips and quarter turns, before rounding; takes 8 times as long.
        progress: is handed the tiles of an image and gives them back, one after another.

    The upscaler raises NonFiniteError where the network gives NaN or infinity, which no byte stands for.
    """
    if tiling == "auto" and not isinstance(network, ShuffleMixer):
        raise ValueError(f"automatic tiles need a ShuffleMixer, got {type(network).__name__}")

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
    low, high = sr.aminmax()  # NaN if there is one
    if not (low.isfinite() and high.isfinite()):
        raise NonFiniteError("expected a network that gives finite values, got NaN or infinity")
    return sr.float().clamp(0, 1).mul(255).round().byte().cpu()
