"""Cutting into tiles and gathering out of them, by numpy and by the compiled kernel."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader import shards
from loader.tiles import gather, split


@given(height=st.integers(1, 70), width=st.integers(1, 70), tile=st.sampled_from([16, 32, 48]), data=st.data())
def test_gather_undoes_split(height: int, width: int, tile: int, data: st.DataObject) -> None:
    image = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), np.uint8)
    tiles = split(image, tile)
    assert tiles.shape == (-(-height // tile), -(-width // tile), tile, tile, 3)
    assert tiles.flags.c_contiguous
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    h, w = data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))
    expected = image[top : top + h, left : left + w]
    out = np.full((h, w, 3), 99, np.uint8)
    gather(tiles, top, left, out)
    np.testing.assert_array_equal(out, expected)
    if shards.kernel is not None:
        batch = np.full((1, h, w, 3), 99, np.uint8)
        column = [np.array([n], np.int64) for n in (tiles.ctypes.data, tiles.shape[1], top, left)]
        shards.kernel.gather(*column, tile, h, w, batch)
        np.testing.assert_array_equal(batch[0], expected)


def test_padding_is_zero() -> None:
    tiles = split(np.full((17, 20, 3), 255, np.uint8), 16)
    assert tiles.sum() == 17 * 20 * 3 * 255
    assert not tiles[1, :, 1:].any()
    assert not tiles[:, 1, :, 4:].any()


@pytest.mark.skipif(shards.kernel is None, reason="the compiled kernel is not in use here")
def test_kernel_refuses_arrays_that_do_not_fit() -> None:
    one, two = np.zeros(1, np.int64), np.zeros(2, np.int64)
    out = np.zeros((1, 4, 4, 3), np.uint8)
    for arguments in (
        (one, two, one, one, 16, 4, 4, out),
        (one, one, one, one, 16, 4, 5, out),
        (two,) * 4 + (0, 4, 4, out),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            shards.kernel.gather(*arguments)
    with pytest.raises(TypeError, match="read-write"):
        shards.kernel.gather(one, one, one, one, 16, 4, 4, out.transpose(0, 2, 1, 3))
