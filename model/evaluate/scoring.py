"""Scoring an upscaler on test images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from loader.errors import ShardsError, one_line
from model.enlarge.upscalers import NonFiniteError, Upscaler
from model.evaluate.pairs import ImagePair
from model.metrics import Image, Scores, score


@dataclass(frozen=True)
class ScoredImage:
    """A test image, the upscaler's result, uint8 (H·scale, W·scale, 3), and its scores."""

    pair: ImagePair
    sr: Image
    scores: Scores


def score_pairs(upscale: Upscaler, pairs: Iterable[ImagePair], border: int) -> Iterator[ScoredImage]:
    """Enlarge each LR image and compare it with HR, excluding `border` pixels along every edge.

    Raises ShardsError, naming the image, if it is too small or the upscaler's result is not finite or has the wrong
    size.
    """
    for pair in pairs:
        try:
            sr = upscale(pair.lr)
            scores = score(sr, pair.hr, border)
        except (ValueError, NonFiniteError) as error:
            raise ShardsError(one_line(f"image {pair.name}: {error}")) from error
        yield ScoredImage(pair, sr, scores)
