"""The resize kernel called directly: arguments are either valid or refused.

`make test-sanitized` also runs these tests under AddressSanitizer and UBSan.
"""

import os
import random
from typing import Any

import numpy as np
import pytest

from loader.resize import imresize as module
from loader.resize.imresize import _weights, _window, imresize, resize_kernel

REFUSED = (TypeError, ValueError, OverflowError, BufferError, MemoryError)
GUARD = 99
SEED = os.environ.get("SRSHARDS_FUZZ_SEED", "0")
ROUNDS = 60 * max(1, int(float(os.environ.get("SRSHARDS_FUZZ_SECONDS", "1"))))
NAMES = (
    "image", "height", "width", "channels", "rows", "out_height", "cols", "out_width", "numerators", "taps", "out",
)  # fmt: skip
needs_kernel = pytest.mark.skipif(resize_kernel is None, reason="needs the compiled kernel")


class Call:
    """A valid call, arguments by name; the output lies between guards."""

    def __init__(self, rng: random.Random, scale: int | None = None) -> None:
        scale = scale or rng.choice([2, 3, 4, 8])
        height, width, channels = (rng.choice([1, 2, 5, 63, 64, 65, rng.randrange(1, 150)]) for _ in range(3))
        channels = rng.choice([1, 3, 4, 7])
        border = rng.choice(["symmetric", "replicate"])
        self.image = np.random.default_rng(rng.randrange(99)).integers(0, 256, (height, width, channels), np.uint8)
        rows, cols = _window(height, scale, border), _window(width, scale, border)
        numerators, _ = _weights(scale)
        self.memory = np.full((len(rows) + 2, len(cols), channels), GUARD, np.uint8)
        self.out = self.memory[1:-1]
        values = (self.image, height, width, channels, rows, len(rows), cols, len(cols), numerators, len(numerators))
        self.arguments: dict[str, Any] = dict(zip(NAMES, (*values, self.out), strict=True))
        self.scale, self.border = scale, border

    def run(self, **changes: Any) -> None:
        resize_kernel.shrink(*(self.arguments | changes).values())

    def refuses(self, **changes: Any) -> None:
        with pytest.raises(REFUSED):
            self.run(**changes)
        assert (self.memory == GUARD).all(), changes


@needs_kernel
def test_valid_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "resize_kernel", None)
    for n in range(ROUNDS):
        call = Call(random.Random(f"{SEED}/{n}"))
        call.run()
        np.testing.assert_array_equal(call.out, imresize(call.image, call.scale, border=call.border))  # type: ignore[arg-type]
        assert (call.memory[[0, -1]] == GUARD).all()


@needs_kernel
@pytest.mark.parametrize("name", ["height", "width", "channels", "out_height", "out_width", "taps"])
def test_invalid_sizes_are_refused(name: str) -> None:
    call = Call(random.Random(name), 4)
    right = call.arguments[name]
    odd = [0, -1, right + 1, 1 << 31, 1 << 32, 1 << 61, (1 << 63) - 1, 1 << 63, -(1 << 63), 1.0, "1", None, [right]]
    for value in odd:
        call.refuses(**{name: value})


@needs_kernel
def test_overflowing_products_are_refused() -> None:
    """2**32 × 2**32 wraps around to 0, the length of an empty image."""
    call = Call(random.Random(0))
    for size in (1 << 32, 1 << 31, 3 << 61, (1 << 62) + 1, 1 << 63, (1 << 63) - 1):
        for image in (np.zeros(0, np.uint8), call.image, np.zeros((0, 1 << 30, 3), np.uint8)):
            call.refuses(height=size, width=size, image=image)
            call.refuses(height=size, width=1, channels=size, image=image)
            call.refuses(out_height=size, out_width=size, out=np.zeros(0, np.uint8))
            call.refuses(out_height=size, rows=np.zeros(0, np.int64))
            call.refuses(out_width=size, cols=np.zeros(0, np.int64))
            call.refuses(width=size)
            call.refuses(channels=size)


def odd_arrays(array: Any) -> list[Any]:
    other: list[Any] = [
        np.int8,
        np.int16,
        np.int32,
        np.uint64,
        np.float64,
        np.uint8,
        np.bool_,
        object,
        ">i8",
        ">i4",
        np.int64,
    ]
    arrays = [array.astype(dtype) for dtype in other if np.dtype(dtype) != array.dtype]
    doubled = np.repeat(array, 2, axis=-1)[..., ::2]
    return [
        *arrays, array[:-1], np.concatenate([array, array[:1]]), doubled, array[..., ::-1][::-1], array.tobytes()[:-1],
        None, "text", 3, b"", [1, 2], np.zeros(0, array.dtype),
    ]  # fmt: skip


@needs_kernel
@pytest.mark.parametrize("name", ["image", "rows", "cols", "numerators", "out"])
def test_invalid_arrays_are_refused(name: str) -> None:
    for n in range(4):
        call = Call(random.Random(n), 3)
        right = call.arguments[name]
        for odd in odd_arrays(right):
            same = isinstance(odd, np.ndarray) and odd.dtype == right.dtype and odd.shape == right.shape
            if not (same and odd.flags.c_contiguous):
                call.refuses(**{name: odd})
    frozen = call.out.copy()
    frozen.flags.writeable = False
    call.refuses(out=frozen)
    call.refuses(out=bytes(call.out))


@needs_kernel
@pytest.mark.parametrize("name", ["rows", "cols"])
@pytest.mark.parametrize("value", [-1, -(1 << 63), (1 << 63) - 1, 1 << 32, None])
def test_windows_beyond_the_image_are_refused(name: str, value: int | None) -> None:
    for n in range(20):
        call = Call(random.Random(n))
        window = call.arguments[name].copy()
        side = call.arguments["height" if name == "rows" else "width"]
        window.flat[random.Random(n).randrange(window.size)] = side if value is None else value
        call.refuses(**{name: window})


@needs_kernel
def test_invalid_weights_are_refused() -> None:
    call = Call(random.Random(1), 4)
    right = call.arguments["numerators"]
    for k, value in ((0, 1 << 30), (3, -(1 << 31)), (7, (1 << 31) - 1)):
        odd = right.copy()
        odd[[k, -1 - k]] = value
        call.refuses(numerators=odd)
        odd[k] = 0
        call.refuses(numerators=odd)
    odd = right.copy()
    odd[0] += 1
    call.refuses(numerators=odd)


@needs_kernel
def test_wrong_argument_counts_are_refused() -> None:
    for n in range(14):
        if n != len(NAMES):
            with pytest.raises(TypeError):
                resize_kernel.shrink(*[np.zeros(1, np.int64)] * n)
