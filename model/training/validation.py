"""Scores of a network on whole images, shared by all ranks, and pictures of some of them."""

from dataclasses import astuple
from pathlib import Path

import torch

from loader import ImageDataset
from model.evaluate import score_pairs
from model.metrics import Scores, mean_scores
from model.pairs import shard_pairs
from model.sheet import make_row, write_sheet
from model.shufflemixer import ShuffleMixer
from model.training.ranks import Ranks
from model.training.stopping import StopRequest
from model.upscalers import Upscaler, bicubic_upscaler, network_upscaler

SHEET_ROWS = 4


def network_scores(network: ShuffleMixer, images: ImageDataset, ranks: Ranks, stop: StopRequest) -> Scores | None:
    """Average a network's scores over all images, each scored by one rank; None in all ranks if one is to stop.

    A border as wide as the scale is left out.
    """
    return _shared(network_upscaler(network, ranks.device), images, ranks, stop)


def bicubic_scores(images: ImageDataset, ranks: Ranks, stop: StopRequest) -> Scores | None:
    """The same of bicubic enlargement."""
    return _shared(bicubic_upscaler(images.scale), images, ranks, stop)


def _shared(upscale: Upscaler, images: ImageDataset, ranks: Ranks, stop: StopRequest) -> Scores | None:
    scores = torch.zeros((len(images), 4), dtype=torch.float64)
    mine = range(ranks.rank, len(images), ranks.world_size)
    for number, (_, one) in zip(mine, score_pairs(upscale, shard_pairs(images, mine), images.scale), strict=False):
        scores[number] = torch.tensor(astuple(one), dtype=torch.float64)
        if stop:
            break
    if ranks.any_of(bool(stop))[0]:
        return None
    return mean_scores(Scores(*row) for row in ranks.total(scores).tolist())


def draw_sheet(network: ShuffleMixer, images: ImageDataset, ranks: Ranks, path: Path) -> None:
    """Draw what the network, and bicubic enlargement, make of the first images."""
    upscale, bicubic = network_upscaler(network, ranks.device), bicubic_upscaler(images.scale)
    path.parent.mkdir(exist_ok=True)
    some = shard_pairs(images, range(min(SHEET_ROWS, len(images))))
    write_sheet(
        [make_row(one.name, one.lr, upscale(one.lr), bicubic(one.lr), one.hr, images.scale) for one in some], path
    )
