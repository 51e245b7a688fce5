"""The plan: independent and uniform draws, a pure function of (seed, epoch, n)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader.plan import Crops, Plan, philox

# (counter, key, words) from the known-answer tests of the Random123 paper.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def row(crops: Crops, i: int) -> tuple[int, ...]:
    """Return image, top, left and transform of one crop."""
    return tuple(int(column[i]) for column in (crops.image, crops.top, crops.left, crops.transform))


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: str) -> None:
    low, high = (np.array([counter[i] | counter[i + 1] << 32], np.uint64) for i in (0, 2))
    found = philox(key[0] | key[1] << 32, int(high[0]), low)
    assert " ".join(f"{int(word[0]):08x}" for word in found) == words


def test_positions_are_equally_likely() -> None:
    """Run a χ² test over all (image, position) pairs of images of unequal size."""
    plan = Plan([6, 4, 9], [5, 4, 4], 4, seed=1, augment=True)  # 6, 1 and 6 positions
    draws = 52_000
    crops = plan.crops(0, np.arange(draws))
    keys, counts = np.unique(np.stack([crops.image, crops.top, crops.left]), axis=1, return_counts=True)
    assert keys.shape[1] == 13
    expected = draws / 13
    assert ((counts - expected) ** 2 / expected).sum() < 32.9  # 12 degrees of freedom, p = 0.001
    assert np.abs(np.bincount(crops.transform, minlength=8) / draws - 1 / 8).max() < 0.01


def test_small_images_are_never_drawn() -> None:
    plan = Plan([3, 8, 3, 8, 3], [8, 8, 8, 8, 8], 4, seed=0, augment=False)
    crops = plan.crops(0, np.arange(1000))
    assert set(crops.image.tolist()) == {1, 3}
    assert not crops.transform.any()
    assert crops.top.max() == crops.left.max() == 4


@given(
    sizes=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=9),
    patch=st.integers(1, 12),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**40),
    samples=st.lists(st.integers(0, 2**62), min_size=1, max_size=20),
)
def test_crops_are_inside_and_independent(
    sizes: list[tuple[int, int]], patch: int, seed: int, epoch: int, samples: list[int]
) -> None:
    sizes = [*sizes, (12, 12)]
    height, width = np.array(sizes).T
    plan = Plan(height, width, patch, seed, augment=True)
    crops = plan.crops(epoch, samples)
    assert ((crops.top >= 0) & (crops.top + patch <= height[crops.image])).all()
    assert ((crops.left >= 0) & (crops.left + patch <= width[crops.image])).all()
    for i, n in enumerate(samples):  # drawn alone and together, a sample is the same
        alone = Plan(height, width, patch, seed, augment=True).crops(epoch, [n])
        assert row(crops, i) == row(alone, 0)


def test_seed_epoch_and_sample_are_distinct() -> None:
    """If keys were summed, (0, 1) and (1, 0) would be the same."""
    plans = {seed: Plan([500], [500], 8, seed, augment=True) for seed in (0, 1)}
    drawn = {
        (seed, epoch, n): plan.crops(epoch, [n])
        for seed, plan in plans.items()
        for epoch in (0, 1, 1 << 32)
        for n in (0, 1, 1 << 32)
    }
    assert len({row(crops, 0) for crops in drawn.values()}) == len(drawn)


# (image, top, left, transform)
PINNED = [(0, 133, 438, 1), (1, 76, 55, 4), (0, 169, 103, 4)]


def test_plan_is_pinned() -> None:
    """Resumed training runs depend on the plan: announce any change in CHANGES.md."""
    crops = Plan([339, 510], [510, 339], 64, seed=42, augment=True).crops(3, [0, 1, 1_000_000])
    assert [row(crops, i) for i in range(3)] == PINNED
