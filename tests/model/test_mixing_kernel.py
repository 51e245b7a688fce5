"""The mixing kernel called directly: for any arguments it stays within its arrays, or raises."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import needs_mixing_kernel
from numpy.typing import NDArray

from model.cpu import mixing_kernel

pytestmark = needs_mixing_kernel

Call = dict[str, Any]  # the arguments of a call, in order
ERRORS = (ValueError, TypeError, BufferError, OverflowError, MemoryError)


def floats(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def mix(channels: int = 32, hidden: int = 32, pixels: int = 70, backward: bool = False, skip: bool = True) -> Call:
    half = channels // 2
    size = channels + 2 * half * hidden + hidden + half
    image = (1, 1, pixels, channels)
    return {
        "x": floats(*image),
        "slope": floats(*image) if backward else None,
        "skip": floats(*image) if skip and not backward else None,
        "out": floats(*image),
        "weights": floats(size + 2 * half * hidden),
        "sums": floats(size) if backward else None,
        "pixels": pixels,
        "channels": channels,
        "hidden": hidden,
        "threads": 2,
    }


def project(channels: int = 32, wide: int = 48, pixels: int = 70, backward: bool = False) -> Call:
    image, inner = (1, 1, pixels, channels), (1, 1, pixels, wide)
    return {
        "x": floats(*inner),
        "slope": floats(*image) if backward else None,
        "skip": None if backward else floats(*image),
        "out": floats(*(inner if backward else image)),
        "weights": floats(2 * wide * channels + channels),
        "sums": floats(wide * channels + channels) if backward else None,
        "pixels": pixels,
        "channels": channels,
        "wide": wide,
        "threads": 2,
    }


def enlarge(
    shape: tuple[int, int, int] = (2, 3, 5),
    channels: int = 32,
    factor: int = 2,
    backward: bool = False,
    tail: bool = True,
) -> Call:
    images, height, width = shape
    small = (images, height, width, channels)
    large = (images, height * factor, width * factor, 3 if tail else channels)
    square, taps = factor**2 * channels**2, 32 * channels if tail else 0
    size = square + factor**2 * channels + taps
    return {
        "x": floats(*small),
        "slope": floats(*large) if backward else None,
        "tail_bias": floats(3) if tail else None,
        "out": floats(*(small if backward else large)),
        "weights": floats(size + square + taps),
        "sums": floats(size) if backward else None,
        "images": images,
        "height": height,
        "width": width,
        "channels": channels,
        "factor": factor,
        "threads": 2,
    }


def depthwise(shape: tuple[int, int, int] = (2, 3, 5), channels: int = 32, kernel_size: int = 3) -> Call:
    image = (*shape, channels)
    sizes = dict(zip(("images", "height", "width"), shape, strict=True))
    sums = floats((kernel_size**2 + 1) * channels)
    return {"x": floats(*image), "slope": floats(*image), "sums": sums} | sizes | {
        "channels": channels,
        "kernel_size": kernel_size,
        "threads": 2,
    }  # fmt: skip


CALLS: dict[str, tuple[str, Callable[[], Call]]] = {
    "mix": ("mix", mix),
    "mix without skip": ("mix", lambda: mix(skip=False)),
    "mix backward": ("mix", lambda: mix(backward=True)),
    "project": ("project", project),
    "project backward": ("project", lambda: project(backward=True)),
    "enlarge": ("enlarge", lambda: enlarge(tail=False)),
    "enlarge backward": ("enlarge", lambda: enlarge(tail=False, backward=True)),
    "enlarge to RGB": ("enlarge", enlarge),
    "enlarge to RGB backward": ("enlarge", lambda: enlarge(backward=True)),
    "depthwise": ("depthwise", depthwise),
}
every_call = pytest.mark.parametrize(("function", "make"), CALLS.values(), ids=CALLS.keys())


def call(function: str, arguments: Call) -> None:
    assert getattr(mixing_kernel.extension, function)(*arguments.values()) is None


@every_call
def test_valid_arguments_fill_the_outputs(function: str, make: Callable[[], Call]) -> None:
    arguments = make()
    outputs = [arguments[name] for name in ("out", "sums") if arguments.get(name) is not None]
    for output in outputs:
        output.fill(np.nan)
    call(function, arguments)
    assert all(np.isfinite(output).all() for output in outputs)


def unaligned(array: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.frombuffer(bytearray(array.nbytes + 1), np.uint8)[1:].view(np.float32).reshape(array.shape)


WRONG_ARRAYS: dict[str, Callable[[NDArray[np.float32]], Any]] = {
    "too short": lambda array: array.reshape(-1)[:-1].copy(),
    "too long": lambda array: np.append(array, np.float32(0)),
    "empty": lambda array: array.reshape(-1)[:0],
    "float64": lambda array: array.astype(np.float64),
    "float64 of as many bytes": lambda array: np.zeros(array.size // 2, np.float64),
    "int32": lambda array: array.view(np.int32),
    "bytes": lambda array: array.tobytes(),
    "other byte order": lambda array: array.astype(">f4"),
    "every second": lambda array: np.repeat(array.reshape(-1), 2)[::2],
    "reversed": lambda array: array.reshape(-1)[::-1],
    "one value, expanded": lambda array: np.broadcast_to(np.float32(1), array.shape),
    "unaligned": unaligned,
    "a number": lambda array: array.ctypes.data,
    "zero": lambda array: 0,
    "a tensor": lambda array: torch.from_numpy(array),
    "a list": lambda array: array.tolist(),
}


@every_call
@pytest.mark.parametrize("wrong", WRONG_ARRAYS.values(), ids=WRONG_ARRAYS.keys())
def test_wrong_arrays_are_refused(function: str, make: Callable[[], Call], wrong: Callable[[Any], Any]) -> None:
    arguments = make()
    for name, array in arguments.items():
        if isinstance(array, np.ndarray):
            with pytest.raises((ValueError, TypeError, BufferError)):
                call(function, arguments | {name: wrong(array)})


@every_call
def test_missing_and_read_only_arrays_are_refused(function: str, make: Callable[[], Call]) -> None:
    arguments = make()
    needed = {"x", "out", "weights", "sums"} | ({"skip"} if function == "project" else set())
    for name, array in arguments.items():
        if name in needed and array is not None:
            with pytest.raises((TypeError, ValueError)):
                call(function, arguments | {name: None})
        if name in ("out", "sums") and array is not None:
            read_only = array.copy()
            read_only.flags.writeable = False
            with pytest.raises((ValueError, BufferError)):
                call(function, arguments | {name: read_only})


HUGE = [2**31, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64]


@every_call
@pytest.mark.parametrize("value", [0, -1, 1, 17, -(2**63), *HUGE])
def test_wrong_sizes_are_refused(function: str, make: Callable[[], Call], value: int) -> None:
    arguments = make()
    for name, size in arguments.items():
        if isinstance(size, int) and value != size and not (name == "threads" and 0 < value <= 1024):
            with pytest.raises((ValueError, OverflowError), match=".+"):
                call(function, arguments | {name: value})


@pytest.mark.parametrize(
    ("function", "arguments", "sizes"),
    [
        ("mix", mix(), {"pixels": 2**59, "hidden": 2**60}),
        ("mix", mix(backward=True), {"hidden": 2**62}),
        ("project", project(), {"pixels": 2**59, "wide": 2**60}),
        ("enlarge", enlarge(), {"images": 2**31, "height": 2**31, "width": 2}),
        ("enlarge", enlarge(), {"images": 2**32, "height": 2**32, "width": 1}),  # 0 after wrapping
        ("depthwise", depthwise(), {"images": 2**32, "height": 2**32, "width": 2**59}),
    ],
)
def test_overflowing_products_are_refused(function: str, arguments: Call, sizes: Call) -> None:
    with pytest.raises(ValueError, match="expected"):
        call(function, arguments | sizes)


@settings(deadline=None)
@given(data=st.data())
def test_any_sizes_compute_or_raise(data: st.DataObject) -> None:
    """Arrays of one call with sizes of another; `make test-sanitized` detects accesses outside arrays."""
    function, make = CALLS[data.draw(st.sampled_from([*CALLS]))]
    arguments = make()
    small = st.integers(-2, 130)
    for name, size in arguments.items():
        if isinstance(size, int):
            likely = st.sampled_from([size, 2 * size, size // 2, 16, 32, 64])
            drawn = data.draw(likely | small | st.integers(-(2**63), 2**63 - 1), name)
            arguments[name] = min(drawn, 8) if name == "threads" else drawn
    with contextlib.suppress(*ERRORS):
        call(function, arguments)


@settings(deadline=None, max_examples=40)
@given(
    channels=st.sampled_from([32, 64, 96]),
    hidden=st.sampled_from([16, 48, 64]),
    pixels=st.integers(1, 200),
    factor=st.integers(1, 4),
    height=st.integers(1, 40),
    width=st.integers(1, 70),
    kernel_size=st.sampled_from([3, 5, 7]),
    threads=st.integers(1, 3),
)
def test_valid_sizes_stay_within_their_arrays(
    channels: int, hidden: int, pixels: int, factor: int, height: int, width: int, kernel_size: int, threads: int
) -> None:
    size = 1 + 200 // (height * width), height, width
    calls = [("depthwise", depthwise(size, channels, kernel_size))]
    for backward in (False, True):
        calls += [
            ("mix", mix(channels, hidden, pixels, backward)),
            ("project", project(channels, hidden, pixels, backward)),
        ]
        for tail in (False, True):
            calls.append(("enlarge", enlarge((1, height, width), 32, factor, backward, tail)))
    for function, arguments in calls:
        call(function, arguments | {"threads": threads})


def test_nothing_runs_before_start() -> None:
    try:
        for library in ("/nowhere/libtorch_cpu.so", b"\xff.so"):
            assert mixing_kernel.extension.start(library, 16) == 0
            with pytest.raises(RuntimeError, match="start"):
                call("mix", mix())
        assert mixing_kernel.start(0) is None
    finally:
        assert mixing_kernel.start() is not None


@pytest.mark.parametrize("arguments", [(), (0, 16), (None, 16), ("libtorch_cpu.so",), ("a\0b", 16), ("a", 2**40)])
def test_start_refuses_invalid_arguments(arguments: tuple[Any, ...]) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError)):
        mixing_kernel.extension.start(*arguments)
    assert mixing_kernel.start() is not None
