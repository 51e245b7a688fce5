"""Splitting images into tiles and gathering crops, with numpy and with the compiled kernel."""

import ctypes
import mmap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader.pixels import tiles as module
from loader.pixels.tiles import copy_crop, gather_crops, gather_kernel, split, transformed


@given(height=st.integers(1, 70), width=st.integers(1, 70), tile=st.sampled_from([16, 32, 48]), data=st.data())
def test_gather_inverts_split(height: int, width: int, tile: int, data: st.DataObject) -> None:
    image = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), np.uint8)
    tiles = split(image, tile)
    assert tiles.shape == (-(-height // tile), -(-width // tile), tile, tile, 3)
    assert tiles.flags.c_contiguous
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    h, w = data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))
    expected = image[top : top + h, left : left + w]
    out = np.full((h, w, 3), 99, np.uint8)
    copy_crop(tiles, top, left, out)
    np.testing.assert_array_equal(out, expected)


@given(
    tile=st.sampled_from([16, 32, 48, 64]),
    side=st.integers(1, 150),
    place=st.tuples(st.integers(0, 50), st.integers(0, 30)),
    number=st.integers(0, 7),
)
def test_kernel_equals_fallback(tile: int, side: int, place: tuple[int, int], number: int) -> None:
    image = np.random.default_rng(side).integers(0, 256, (200, 180, 3), np.uint8)
    tiles = split(image, tile)
    top, left = place
    expected = transformed(image[top : top + side, left : left + side], number)
    address, cols, tops, lefts, numbers = (
        np.full(2, n, np.int64) for n in (tiles.ctypes.data, tiles.shape[1], top, left, number)
    )
    for use in {gather_kernel, None}:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "gather_kernel", use)
            out = np.full((3, side, side, 3), 99, np.uint8)  # the third detects writes beyond the second
            gather_crops(address, cols, tops, lefts, numbers, tile, out[:2])
        np.testing.assert_array_equal(out[0], expected)
        np.testing.assert_array_equal(out[1], expected)
        assert (out[2] == 99).all()


@pytest.mark.parametrize("shift", [0, 16])
def test_large_outputs(shift: int) -> None:
    """Outputs larger than the caches use non-temporal stores if they start on a cache line."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (700, 900, 3), np.uint8)
    tiles, count, side = split(image, 64), 43, 256
    top, left, number = (rng.integers(0, high, count) for high in (445, 645, 8))
    memory = np.empty(count * side * side * 3 + 128, np.uint8)
    out = memory[-memory.ctypes.data % 64 + shift :][: count * side * side * 3].reshape(count, side, side, 3)
    address, cols = np.full(count, tiles.ctypes.data), np.full(count, tiles.shape[1])
    gather_crops(address, cols, top, left, number, 64, out)
    for k in range(count):
        crop = image[top[k] : top[k] + side, left[k] : left[k] + side]
        np.testing.assert_array_equal(out[k], transformed(crop, int(number[k])))


def test_kernel_stays_within_its_pages() -> None:
    """Gather from tiles surrounded by pages that must not be accessed."""
    if gather_kernel is None:
        pytest.skip("needs the compiled kernel")
    side, libc = 64, ctypes.CDLL(None)
    with mmap.mmap(-1, 5 * mmap.PAGESIZE) as memory:
        data = np.frombuffer(memory, np.uint8)
        start = data.ctypes.data
        for page in (0, 4):
            assert libc.mprotect(ctypes.c_void_p(start + page * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
        tile = data[mmap.PAGESIZE :][: side * side * 3]
        tile[:] = np.random.default_rng(0).integers(0, 256, tile.size, np.uint8)
        image = tile.reshape(side, side, 3)
        for number in range(8):
            for size in (1, 3, 4, 5, 6, 11, 64):
                for top, left in ((0, 0), (side - size, side - size)):
                    out = np.empty((1, size, size, 3), np.uint8)
                    address, cols, y, x, turn = (np.array([n]) for n in (tile.ctypes.data, 1, top, left, number))
                    gather_crops(address, cols, y, x, turn, side, out)
                    np.testing.assert_array_equal(
                        out[0], transformed(image[top : top + size, left : left + size], number)
                    )
        del data, tile, image


def test_transforms_are_the_eight_symmetries() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert len({transformed(image, number).tobytes() for number in range(8)}) == 8
    np.testing.assert_array_equal(transformed(image, 0), image)
    np.testing.assert_array_equal(transformed(image, 1), image[:, ::-1])
    np.testing.assert_array_equal(transformed(image, 2), image[::-1])
    np.testing.assert_array_equal(transformed(image, 4), image.transpose(1, 0, 2))
    np.testing.assert_array_equal(transformed(image, 5), np.rot90(image, 1))


def test_padding_is_zero() -> None:
    tiles = split(np.full((17, 20, 3), 255, np.uint8), 16)
    assert tiles.sum() == 17 * 20 * 3 * 255
    assert not tiles[1, :, 1:].any()
    assert not tiles[:, 1, :, 4:].any()
