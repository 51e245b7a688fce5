"""The gather kernel called directly, and its fallback: arguments are either valid or refused.

`make test-sanitized` also runs these tests under AddressSanitizer and UBSan. Addresses cannot be checked by the kernel,
so invalid ones are only passed in calls that must be refused.
"""

import mmap
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from loader.pixels import tiles as module
from loader.pixels.tiles import gather_crops, gather_kernel, split, transformed

REFUSED = (TypeError, ValueError, OverflowError, BufferError)
WRAP = ((1 << 63) - 1, -(1 << 63), -1)
WAYS = [pytest.param(gather_kernel, id="compiled"), pytest.param(None, id="fallback")]
GUARD = 99
SEED = os.environ.get("SRSHARDS_FUZZ_SEED", "0")
ROUNDS = 200 * max(1, int(float(os.environ.get("SRSHARDS_FUZZ_SECONDS", "1"))))
needs_kernel = pytest.mark.skipif(gather_kernel is None, reason="needs the compiled kernel")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make `gather_crops` use the compiled kernel or the fallback."""
    if request.param is None and "compiled" in request.node.callspec.id:
        pytest.skip("needs the compiled kernel")
    monkeypatch.setattr(module, "gather_kernel", request.param)
    return request.param


class Call:
    """A valid call and its expected result; the output lies between guards."""

    def __init__(self, rng: random.Random) -> None:
        self.tile, count = rng.choice([1, 2, 7, 16, 64]), rng.randrange(0, 5)
        square = rng.random() < 0.7
        self.height = rng.randrange(1, 40)
        self.width = self.height if square else rng.randrange(1, 40)
        rows, columns = self.height + rng.randrange(60), self.width + rng.randrange(60)
        noise = np.random.default_rng(rng.randrange(1 << 30))
        image = noise.integers(0, 256, (rows, columns, 3), np.uint8)
        self.tiles = split(image, self.tile)

        def column(low: int, high: int) -> Any:
            return noise.integers(low, high, count)

        self.address = np.full(count, self.tiles.ctypes.data, np.int64)
        self.cols = np.full(count, self.tiles.shape[1], np.int64)
        self.top, self.left = column(0, rows - self.height + 1), column(0, columns - self.width + 1)
        self.transform = column(0, 8 if square else 4)
        self.memory = np.full((count + 2, self.height, self.width, 3), GUARD, np.uint8)
        self.out = self.memory[1:-1]
        crops = (image[y : y + self.height, x : x + self.width] for y, x in zip(self.top, self.left, strict=True))
        self.expected = [transformed(c, int(t)) for c, t in zip(crops, self.transform, strict=True)]

    def arguments(self) -> list[Any]:
        columns = [self.address, self.cols, self.top, self.left, self.transform]
        return [*columns, self.tile, self.height, self.width, self.out]

    def check(self) -> None:
        for found, expected in zip(self.out, self.expected, strict=True):
            np.testing.assert_array_equal(found, expected)
        assert (self.memory[[0, -1]] == GUARD).all()


def test_valid_calls(way: Any) -> None:
    for n in range(ROUNDS if way else 60):
        call = Call(random.Random(f"{SEED}/{n}"))
        gather_crops(call.address, call.cols, call.top, call.left, call.transform, call.tile, call.out)
        call.check()


def odd_arrays(array: Any, rng: random.Random) -> Iterator[Any]:
    """Yield arrays of another type, length or layout, and other objects."""
    for dtype in (np.int32, np.uint64, np.float64, np.bool_, np.complex128, ">i8", np.int8, "S8", object, "m8[s]"):
        yield array.astype(dtype)
    yield np.append(array, array[:1])
    yield array[:-1]
    yield array[None]
    yield np.repeat(array, 2)[::2]
    yield array[::-1]
    yield array.tobytes()
    yield array.view(np.uint8)
    yield rng.choice([None, "text", 3, [1, 2], b"", bytearray(8), memoryview(b"12345678"), np.int64(3), object()])


def unlike(array: Any) -> Callable[[Any], bool]:
    """Return a filter for arrays that really differ: an array of one entry, reversed, is the same."""

    def differs(odd: Any) -> bool:
        same = isinstance(odd, np.ndarray) and odd.dtype == array.dtype and odd.shape == array.shape
        return not (same and odd.flags.c_contiguous)

    return differs


@needs_kernel
def test_invalid_arrays_are_refused() -> None:
    for n in range(60):
        rng = random.Random(n)
        call = Call(rng)
        if len(call.address) < 2:
            continue
        for k in range(5):
            right = call.arguments()[k]
            for odd in filter(unlike(right), odd_arrays(right, rng)):
                arguments = call.arguments()
                arguments[k] = odd
                with pytest.raises(REFUSED):
                    gather_kernel.gather(*arguments)
        assert (call.memory == GUARD).all()


@needs_kernel
def test_invalid_outputs_are_refused() -> None:
    call = next(call for call in map(Call, map(random.Random, range(99))) if len(call.out) > 2 and call.height > 1)
    frozen = call.out.copy()
    frozen.flags.writeable = False
    shape = call.out.shape
    for odd in (
        frozen, bytes(call.out), call.out.ravel(), call.out[:-1], call.out[:, 1:], call.out[:, :, ::-1],
        call.out.swapaxes(1, 2), call.out.astype(np.int8), call.out.astype(np.uint16), None, 7, np.zeros(0, np.uint8),
        np.zeros((*shape[:3], 4), np.uint8), np.zeros((shape[0] * shape[1], 1, *shape[2:]), np.uint8),
        call.out.view(np.bool_), call.out[..., None],
    ):  # fmt: skip
        with pytest.raises(REFUSED):
            gather_kernel.gather(*call.arguments()[:-1], odd)
    assert (call.memory == GUARD).all()


@pytest.mark.parametrize("column", ["address", "cols", "top", "left", "transform"])
def test_values_out_of_range_are_refused(way: Any, column: str) -> None:
    """One value is `top = 2**63 - 1`: adding a height overflows to a negative number, which lies within any image."""
    for n in range(60):
        call = Call(random.Random(n))
        values: list[int] = list(WRAP)
        values.append(0 if column in ("address", "cols") else 1 << 62)
        if column == "cols":
            values.append(-(-call.width // call.tile) - 1)
        if column == "left":
            values.append(int(call.cols[0]) * call.tile - call.width + 1 if len(call.cols) else 1 << 40)
        if column == "transform":
            values += [8, 1 << 32, *([4, 7] if call.height != call.width else [])]
        for value in values:
            for k in range(len(call.address)):
                columns = {name: getattr(call, name).copy() for name in ("address", "cols", "top", "left", "transform")}
                columns[column][k] = value
                with pytest.raises(ValueError, match="expected"):
                    gather_crops(**columns, tile=call.tile, out=call.out)
        assert (call.memory == GUARD).all()


@needs_kernel
@pytest.mark.parametrize("which", ["tile", "height", "width"])
@pytest.mark.parametrize(
    "value", [0, -1, 1 << 30, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, -(1 << 63), 1.0, "1", None]
)
def test_invalid_sizes_are_refused(which: str, value: Any) -> None:
    for n in range(10):
        call = Call(random.Random(n))
        arguments = call.arguments()
        arguments[5 + ["tile", "height", "width"].index(which)] = value
        with pytest.raises(REFUSED):
            gather_kernel.gather(*arguments)
        assert (call.memory == GUARD).all()


@needs_kernel
def test_overflowing_sizes_are_refused() -> None:
    """(2**30 - 1) squared, times 3, times a count wraps around to a size that no buffer has."""
    one = np.ones(1, np.int64)
    for height, width in (((1 << 30) - 1, (1 << 30) - 1), (1 << 29, 1 << 29), (1, (1 << 30) - 1)):
        with pytest.raises(REFUSED):
            gather_kernel.gather(one, one, one, one, one * 0, 1 << 29, height, width, np.zeros((1, 1, 1, 3), np.uint8))


@needs_kernel
def test_wrong_argument_counts_are_refused() -> None:
    for n in range(12):
        if n != 9:
            with pytest.raises(TypeError):
                gather_kernel.gather(*[np.zeros(1, np.int64)] * n)
        if n != 3:
            with pytest.raises(TypeError):
                gather_kernel.advise(*[np.zeros(1, np.int64)] * n)


@needs_kernel
def test_misaligned_arrays() -> None:
    """Arrays may start at any address."""
    call = next(call for call in map(Call, map(random.Random, range(99))) if len(call.out) > 2)
    columns = []
    for column in call.arguments()[:5]:
        memory = np.zeros(column.nbytes + 1, np.uint8)
        memory[1:] = column.view(np.uint8)
        columns.append(memory[1:].view(np.int64))
    try:
        gather_kernel.gather(*columns, *call.arguments()[5:])
    except REFUSED:
        return
    call.check()


@needs_kernel
def test_advice() -> None:
    """Refuse invalid arrays, ranges beyond the address space, and advice that changes the content of memory."""
    with mmap.mmap(-1, 4 * mmap.PAGESIZE) as memory:
        memory[:4] = b"kept"
        view = np.frombuffer(memory, np.uint8)
        address, length = np.array([view.ctypes.data, view.ctypes.data]), np.array([4096, 8192])
        for advice in (mmap.MADV_NORMAL, mmap.MADV_RANDOM, mmap.MADV_SEQUENTIAL, mmap.MADV_WILLNEED):
            gather_kernel.advise(address, length, advice)
        gather_kernel.advise(address[:0], length[:0], mmap.MADV_WILLNEED)
        gather_kernel.advise(address + 1, length, mmap.MADV_WILLNEED)  # the system declines
        for advice in (mmap.MADV_REMOVE, mmap.MADV_DONTFORK, 100, -1, 1 << 30):
            with pytest.raises(ValueError, match="advice: expected"):
                gather_kernel.advise(address, length, advice)
        for number in (1 << 40, None, "3", 3.0):
            with pytest.raises(REFUSED):
                gather_kernel.advise(address, length, number)
        for odd in (*WRAP, 0):
            with pytest.raises(ValueError, match="address space"):
                gather_kernel.advise(np.array([address[0], odd]), length, mmap.MADV_WILLNEED)
        for odd in WRAP:
            with pytest.raises(ValueError, match="address space"):
                gather_kernel.advise(address, np.array([4096, odd]), mmap.MADV_WILLNEED)
        rng = random.Random(0)
        for odd_array in filter(unlike(length), odd_arrays(length, rng)):
            for arguments in ((address, odd_array), (odd_array, length)):
                with pytest.raises(REFUSED):
                    gather_kernel.advise(*arguments, mmap.MADV_WILLNEED)
        assert memory[:4] == b"kept"
        del view
