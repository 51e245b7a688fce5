"""Self-ensemble: the mean of a network's outputs over the 8 flips and quarter turns of an image."""

from __future__ import annotations

import torch
from torch import Tensor

from model.enlarge.tiles import Forward


def self_ensembled(forward: Forward) -> Forward:
    """Return `forward` averaged over the 8 flips and quarter turns of its input, each undone on the output.

    Source: Lim et al., "Enhanced Deep Residual Networks for Single Image Super-Resolution", 2017, section 3.4.
    """

    def averaged(lr: Tensor) -> Tensor:
        total: Tensor | None = None
        for turns in range(4):
            for mirrored in (False, True):
                view = torch.rot90(lr.flip(-1) if mirrored else lr, turns, (-2, -1))
                sr = torch.rot90(forward(view), -turns, (-2, -1))
                sr = sr.flip(-1) if mirrored else sr
                total = sr if total is None else total + sr
        assert total is not None
        return total / 8

    return averaged
