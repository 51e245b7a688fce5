"""Validation: scores on whole images, computed by all ranks together, and a sheet of the first few."""

from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch

from loader import ImageDataset, ShardsError
from loader.errors import one_line
from loader.system.free_memory import available_memory
from model.device import is_out_of_memory
from model.enlarge.receptive_field import receptive_radius
from model.enlarge.tile_size import MIN_TILE, forward_bytes_per_pixel
from model.enlarge.tiles import Tiling
from model.enlarge.upscalers import Upscaler, bicubic_upscaler, network_upscaler
from model.evaluate.pairs import shard_pairs
from model.evaluate.scoring import score_pairs
from model.evaluate.sheet import make_row, write_sheet
from model.metrics import WINDOW, Image, Scores, mean_scores
from model.shufflemixer import ShuffleMixer
from model.training.ranks import Ranks
from model.training.stopping import StopRequest

SHEET_ROWS = 4
Note = Callable[[str], None]


def open_validation(folder: str, scale: int) -> ImageDataset:
    """Open a validation dataset. ShardsError if an image is too small to be scored."""
    images = ImageDataset(folder, scale)
    if not len(images):
        raise ShardsError(f"{one_line(folder)}: expected at least one validation image, got none")
    sides = np.minimum(*images.shards.index.sizes(scale)) * scale
    small = np.flatnonzero(sides - 2 * scale < WINDOW)
    if small.size:
        least, name = WINDOW + 2 * scale, one_line(images.names[int(small[0])])
        raise ShardsError(
            f"{one_line(folder)}: expected validation images of at least {least} × {least} pixels (SSIM's window of "
            f"{WINDOW} inside a border of {scale}), got {small.size} of {len(images)} smaller: {name}"
            f"{', ...' if small.size > 1 else ''}"
        )
    return images


def network_scores(
    network: ShuffleMixer, images: ImageDataset, ranks: Ranks, stop: StopRequest, note: Note
) -> Scores | None:
    """Return a network's mean scores over all images; None on all ranks if one is asked to stop.

    Each rank scores a part of the images. A border as wide as the scale is excluded. `note` is called once if images
    are enlarged in tiles.
    """
    return _mean_scores(fitting_upscaler(network, ranks.device, note), images, ranks, stop)


def bicubic_scores(images: ImageDataset, ranks: Ranks, stop: StopRequest) -> Scores | None:
    """Return the scores of bicubic enlargement, computed like `network_scores`."""
    return _mean_scores(bicubic_upscaler(images.scale), images, ranks, stop)


def fitting_upscaler(network: ShuffleMixer, device: torch.device, note: Note) -> Upscaler:
    """Return an upscaler that enlarges images whole if memory allows, else in tiles, halving them until they fit.

    It raises MemoryError if the smallest tile does not fit.
    """
    noted = False

    def upscale(lr: Image) -> Image:
        nonlocal noted
        height, width = lr.shape[:2]
        for tiling in _tilings(network, device, height, width):
            if tiling is not None and not noted:
                note(
                    f"validation images too large for memory ({height} × {width} LR pixels) are enlarged in tiles of "
                    f"{tiling.tile} × {tiling.tile}"
                )
                noted = True
            try:
                return network_upscaler(network, device, tiling=tiling)(lr)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if device.type == "cuda":
                torch.cuda.empty_cache()
        raise MemoryError(f"out of memory for a validation image of {height} × {width} LR pixels, even in tiles")

    return upscale


def _tilings(network: ShuffleMixer, device: torch.device, height: int, width: int) -> Iterator[Tiling | None]:
    """Yield ways to enlarge an image, from the fastest to the one with the least memory; None: as a whole."""
    # Running out of GPU memory raises an error, but on the CPU the system kills the process: estimate there.
    per_pixel = forward_bytes_per_pixel(network)
    needed = height * width * per_pixel
    free = available_memory()
    fits = device.type != "cpu" or free is None or needed < free
    if fits:
        yield None
    tile, overlap = max(height, width) // 2, receptive_radius(network)
    if overlap is None:  # tiles would change the result: always enlarge the whole image
        if not fits:
            yield None
        return
    while not fits and free is not None and tile > MIN_TILE and (tile + 2 * overlap) ** 2 * per_pixel > free:
        tile //= 2
    while tile >= MIN_TILE:
        yield Tiling(tile, overlap)
        tile //= 2
    yield Tiling(MIN_TILE // 2, overlap)


def _mean_scores(upscale: Upscaler, images: ImageDataset, ranks: Ranks, stop: StopRequest) -> Scores | None:
    scores = torch.zeros((len(images), 4), dtype=torch.float64)
    mine = range(ranks.rank, len(images), ranks.world_size)
    with ranks.fail_together():
        for number, result in zip(mine, score_pairs(upscale, shard_pairs(images, mine), images.scale), strict=False):
            scores[number] = torch.tensor(astuple(result.scores), dtype=torch.float64)
            if stop:
                break
    if ranks.any_of(bool(stop))[0]:
        return None
    return mean_scores(Scores(*row) for row in ranks.sum(scores).tolist())


def draw_sheet(network: ShuffleMixer, images: ImageDataset, ranks: Ranks, path: Path) -> None:
    """Draw a sheet of the first images: LR, bicubic, network and HR."""
    upscale, bicubic = fitting_upscaler(network, ranks.device, lambda _: None), bicubic_upscaler(images.scale)
    path.parent.mkdir(exist_ok=True)
    some = shard_pairs(images, range(min(SHEET_ROWS, len(images))))
    write_sheet(
        [make_row(one.name, one.lr, upscale(one.lr), bicubic(one.lr), one.hr, images.scale) for one in some], path
    )
