"""Which crop is sample n of epoch e under seed s: a pure function, vectorised over n.

A counter-based random generator carries no state from sample to sample: any worker, rank or resumed run computes any
sample on its own, long before it is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

TRANSFORMS = 8


@dataclass(frozen=True)
class Crop:
    """The origin of a sample: image name, top and left in LR pixels, one of the 8 transforms."""

    image: str
    top: int
    left: int
    transform: int


@dataclass(frozen=True)
class Crops:
    """Positions of crops of one size: int64 arrays (n,) of image numbers, top and left in LR pixels, transforms."""

    image: NDArray[np.int64]
    top: NDArray[np.int64]
    left: NDArray[np.int64]
    transform: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, which: slice) -> "Crops":
        return Crops(self.image[which], self.top[which], self.left[which], self.transform[which])


def concatenated(parts: Sequence[Crops]) -> Crops:
    """Return the crops of all parts, in order."""
    return Crops(
        np.concatenate([part.image for part in parts]),
        np.concatenate([part.top for part in parts]),
        np.concatenate([part.left for part in parts]),
        np.concatenate([part.transform for part in parts]),
    )


class Plan:
    """A plan in which every (image, position) pair is equally likely.

    Args:
        height, width: int arrays (images,), in LR pixels; images smaller than the patch are never drawn.
        patch: side of the crop in LR pixels.
        seed: 0 ≤ seed < 2**64.
        augment: draw one of the 8 transforms; if False, transform is always 0, the identity.
    """

    def __init__(self, height: ArrayLike, width: ArrayLike, patch: int, seed: int, augment: bool) -> None:
        tops = np.maximum(np.asarray(height, np.int64) - patch + 1, 0)
        self._lefts = np.maximum(np.asarray(width, np.int64) - patch + 1, 0)
        self._bounds = np.concatenate([[0], np.cumsum(tops * self._lefts)])
        self._seed = seed
        self._augment = augment

    @property
    def positions(self) -> int:
        """Number of (image, position) pairs."""
        return int(self._bounds[-1])

    def crops(self, epoch: int, samples: ArrayLike) -> Crops:
        """Return the crops of samples (int array, each ≥ 0) of an epoch ≥ 0."""
        words = philox(self._seed, epoch, np.asarray(samples, np.uint64))
        # 64 random bits modulo the number of positions: the bias is below positions / 2**64.
        pick = (words[0] << np.uint64(32) | words[1]) % np.uint64(self._bounds[-1])
        pick = pick.astype(np.int64)
        image = np.searchsorted(self._bounds, pick, side="right") - 1
        top, left = np.divmod(pick - self._bounds[image], self._lefts[image])
        transform = (words[2] if self._augment else np.zeros_like(words[2])) % np.uint64(TRANSFORMS)
        return Crops(image, top, left, transform.astype(np.int64))


def philox(seed: int, epoch: int, sample: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], ...]:
    """Return four independent random 32-bit words per sample: Philox4x32 with 10 rounds.

    The key is the seed; the counter is (sample, epoch), 64 bits each, low word first. Distinct triples have distinct
    draws. Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Returns: four uint64 arrays shaped like `sample`, values below 2**32.
    """
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    c0, c1 = sample & low, sample >> half
    c2, c3 = (np.full_like(sample, word) for word in (epoch & 0xFFFFFFFF, epoch >> 32))
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (b >> half) ^ c1 ^ np.uint64(key0),
            b & low,
            (a >> half) ^ c3 ^ np.uint64(key1),
            a & low,
        )
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3
