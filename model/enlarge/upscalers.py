"""What enlarges an image: MATLAB's bicubic, or a network, as a function from uint8 (H, W, 3) to (H·s, W·s, 3)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from loader.errors import ShardsError
from loader.resize.imresize import enlarge
from model.enlarge.tiles import Forward, Tiling, Watch, automatic_tiling, by_tiles
from model.enlarge.tiles import self_ensemble as ensemble
from model.metrics import Image
from model.shufflemixer import ShuffleMixer

Upscaler = Callable[[Image], Image]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
KEPT = (1 << 31) - 1  # bytes


class OutputError(ShardsError):
    """A network whose result is no image."""


def keep_freed_memory() -> None:
    """Let the process keep what it frees: features of many megabytes come and go with every layer.

    By default glibc returns each to the system and asks for it again, which clears it page by page: on the CPU that
    takes as long as half of the network's own work. For commands; a library leaves its process as it is.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, KEPT)
    mallopt(M_TRIM_THRESHOLD, KEPT)


def bicubic_upscaler(scale: int) -> Upscaler:
    """Enlarge by MATLAB's bicubic."""
    return lambda lr: enlarge(lr, scale)


def network_upscaler(
    network: nn.Module,
    device: torch.device,
    *,
    tiling: Tiling | Literal["auto"] | None = None,
    self_ensemble: bool = False,
    watch: Watch = lambda tiles: tiles,
) -> Upscaler:
    """Enlarge by `network`, which must be on `device`; its output is clamped and rounded to uint8.

    Args:
        network: float (N, 3, H, W) in [0, 1] to (N, 3, H·s, W·s).
        device: where it is.
        tiling: None enlarges the image as a whole; "auto", for a ShuffleMixer, tile by tile where it is too large.
        self_ensemble: average over the 8 flips and quarter turns, before rounding; takes 8 times as long.
        watch: is handed the tiles of an image and gives them back, one after another.

    The upscaler raises OutputError where the network gives NaN or infinity, which no byte stands for.
    """
    if tiling == "auto" and not isinstance(network, ShuffleMixer):
        raise ValueError(f"automatic tiles need a ShuffleMixer, got {type(network).__name__}")

    def to_device(pixels: Tensor) -> Tensor:
        result: Tensor = network(pixels.to(device).float() / 255)
        return result

    forward: Forward = ensemble(to_device) if self_ensemble else to_device

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
                sr = by_tiles(forward, pixels, tiles, _to_bytes, watch)
        finally:
            network.train(training)
        return np.ascontiguousarray(sr[0].permute(1, 2, 0).numpy())

    return upscale


def _to_bytes(sr: Tensor) -> Tensor:
    low, high = sr.aminmax()  # NaN if there is one
    if not (low.isfinite() and high.isfinite()):
        raise OutputError("expected a network that gives finite values, got NaN or infinity")
    return sr.float().clamp(0, 1).mul(255).round().byte().cpu()
