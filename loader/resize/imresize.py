"""MATLAB's bicubic imresize, bit for bit: shrinking by 2, 3, 4 or 8 with antialiasing, and enlarging.

MATLAB resizes rows (height) first, then columns, and rounds a uint8 image to uint8 after each pass, halves away from
zero. Output pixel x (from 1) is a weighted sum of the input around u = x·s + (1 − s)/2. The weights are those of the
cubic convolution of R. Keys (1981, a = −1/2), stretched by s when shrinking.

Shrinking uint8 needs no floating point. For integer s all output pixels have the same weights, which are exact
fractions: (−3 −9 29 111 111 29 −9 −3)/256 for s = 2. Ties (halves) occur only if the denominator is even, and then it
is a power of two, so that MATLAB's doubles are exact, too: integer arithmetic gives the same bits, and is fast.
"""

import math
from functools import cache
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from loader.arguments import as_integer, describe, require
from loader.format.layout import SCALES
from loader.native import compiled

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Rounding = Literal["uint8", "double"]
Border = Literal["symmetric", "replicate"]

resize_kernel = compiled("loader.resize._imresize")


def imresize(image: Pixels, scale: int, *, rounding: Rounding = "uint8", border: Border = "symmetric") -> Pixels:
    """Shrink uint8 (H, W[, C]) to (ceil(H/scale), ceil(W/scale)[, C]) as MATLAB does.

    Args:
        image: any H, W ≥ 1.
        scale: 2, 3, 4 or 8.
        rounding: "uint8" is `imresize(I, 1/scale)`, rounded after each pass; "double" is
            `im2uint8(imresize(im2double(I), 1/scale))`, rounded once at the end.
        border: extrapolation beyond the edge: "symmetric" mirrors the image (MATLAB since R2015b), "replicate"
            repeats the edge pixel (earlier versions).

    Raises:
        ValueError: an argument is not one of these.
    """
    scale = _check(image, scale, rounding, border)
    height, width = image.shape[:2]
    if rounding == "double":
        return _float_resize(image, 1 / scale, rounding, border)
    cube = np.ascontiguousarray(image.reshape(height, width, -1))
    rows, cols = (_window(n, scale, border) for n in (height, width))
    if resize_kernel is not None:
        small = np.empty((len(rows), len(cols), cube.shape[2]), np.uint8)
        numerators, _ = _weights(scale)
        resize_kernel.shrink(cube, *cube.shape, rows, len(rows), cols, len(cols), numerators, len(numerators), small)
    else:
        small = _shrink(_shrink(cube, scale, rows, 0), scale, cols, 1)
    return small.reshape(small.shape[:2] + image.shape[2:])


def enlarge(image: Pixels, scale: int, *, rounding: Rounding = "uint8", border: Border = "symmetric") -> Pixels:
    """Enlarge uint8 (H, W[, C]) to (H·scale, W·scale[, C]): MATLAB's `imresize(I, scale)`.

    Arguments and errors are those of `imresize`.
    """
    scale = _check(image, scale, rounding, border)
    return _float_resize(image, float(scale), rounding, border)


def _check(image: Pixels, scale: int, rounding: str, border: str) -> int:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (2, 3) or not image.size:
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image: expected a uint8 array (H, W) or (H, W, C), got {got}")
    whole = as_integer(scale)
    if whole not in SCALES:
        raise ValueError(f"scale: expected one of {SCALES}, got {describe(scale)}")
    require("rounding", '"uint8" or "double"', rounding, rounding in ("uint8", "double"))
    require("border", '"symmetric" or "replicate"', border, border in ("symmetric", "replicate"))
    return whole


def _inside(index: Indices, length: int, border: str) -> Indices:
    """Map positions beyond [0, length) to the pixels that the border rule puts there."""
    if border == "replicate":
        return np.clip(index, 0, length - 1)
    index = index % (2 * length)
    return np.minimum(index, 2 * length - 1 - index)


# Shrinking uint8, in integers.


@cache
def _weights(scale: int) -> tuple[NDArray[np.int32], int]:
    """Return the weights of one output pixel in lowest terms: numerators (taps,), and their denominator.

    The weight at distance d pixels is k(d/s)/s for Keys' function k; with t = m/D, D = 2s, 2·D³·k(t) is an integer.
    """
    whole = 2 * scale
    distances = [2 * tap + 1 - 4 * scale + scale % 2 for tap in range(4 * scale)]  # in half pixels
    taps = []
    for m in map(abs, distances):
        if m <= whole:
            taps.append(3 * m**3 - 5 * m**2 * whole + 2 * whole**3)
        else:
            taps.append(-(m**3) + 5 * m**2 * whole - 8 * m * whole**2 + 4 * whole**3)
    while taps[-1] == 0:
        taps.pop()
    divisor = math.gcd(*taps)
    return np.array(taps, np.int32) // divisor, sum(taps) // divisor


def _window(length: int, scale: int, border: str) -> Indices:
    """Return the input pixels (ceil(length/scale), taps) of each output pixel along one axis."""
    taps = len(_weights(scale)[0])
    first = np.arange(-(-length // scale))[:, None] * scale + (scale - taps) // 2
    return _inside(first + np.arange(taps), length, border)


def _shrink(cube: Pixels, scale: int, window: Indices, axis: int) -> Pixels:
    """Shrink (H, W, C) along axis 0 or 1 by matrix products with a band of weights: fallback of the compiled kernel.

    Each product computes `block` output pixels along the axis. Float errors are too small to cross a half, so rounding
    is exact: in float32 for 2, 3 and 4; sums at 8 exceed its 24 bits.
    """
    kind = np.float64 if scale == 8 else np.float32
    numerators, denominator = _weights(scale)
    block, taps, channels = 4 if axis else 16, len(numerators), cube.shape[2]
    span = (block - 1) * scale + taps
    band = np.zeros((block, span), kind)
    for i in range(block):
        band[i, i * scale : i * scale + taps] = numerators / denominator
    # The pixels of all windows in order, including those beyond the edges, and padding for the last block.
    blocks = -(-len(window) // block)
    reach = np.concatenate([window[:, :scale].ravel(), window[-1, scale:]])
    reach = np.pad(reach, (0, (blocks - 1) * block * scale + span - len(reach)))
    shape = list(cube.shape)
    shape[axis] = len(window)
    out = np.empty(shape, np.uint8)
    if axis == 0:
        flat, target = cube.reshape(len(cube), -1), out.reshape(len(window), -1)
        for i in range(blocks):
            start = i * block
            some = band[: len(window) - start] @ flat[reach[start * scale : start * scale + span]].astype(kind)
            target[start : start + block] = _round(some)
        return out
    band = np.kron(band, np.eye(channels, dtype=kind)).T.copy()
    for top in range(0, len(cube), 64):
        strip = cube[top : top + 64].take(reach, 1).astype(kind, "C")
        step, item = block * scale * channels * strip.itemsize, strip.itemsize
        windows = as_strided(strip, (blocks, len(strip), span * channels), (step, strip.strides[0], item))
        some = (windows @ band).transpose(1, 0, 2).reshape(len(strip), -1, channels)
        out[top : top + 64] = _round(some[:, : len(window)])
    return out


def _round(values: NDArray[np.floating]) -> Pixels:
    """Round to uint8, halves up, clipped to 0..255. Overwrites `values`."""
    values += values.dtype.type(0.5)
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


# Everything else, in doubles.


def _float_resize(image: Pixels, factor: float, rounding: str, border: str) -> Pixels:
    """Run both passes in float64, summing taps in order, as MATLAB does."""
    values = image.astype(np.float64) if rounding == "uint8" else image / 255
    for _ in range(2):  # each pass resizes axis 0, then swaps the axes
        values = _float_pass(values, factor, border)
        if rounding == "uint8":
            values = _round(values).astype(np.float64)
        values = values.swapaxes(0, 1)
    return _round(values if rounding == "uint8" else values * 255).copy()


def _float_pass(values: Floats, factor: float, border: str) -> Floats:
    weights, index = _contributions(len(values), factor, border)
    values = np.ascontiguousarray(values)
    shape = (-1,) + (1,) * (values.ndim - 1)
    total = np.zeros((len(weights), *values.shape[1:]))
    for tap in range(weights.shape[1]):
        total += weights[:, tap].reshape(shape) * values[index[:, tap]]
    return total


def _contributions(length: int, factor: float, border: str) -> tuple[Floats, Indices]:
    """Return MATLAB's weights and input pixels (outputs, taps) along one axis, computed in its order of operations."""
    stretch = min(factor, 1.0)
    out = np.arange(1, math.ceil(length * factor) + 1)
    centre = out / factor + 0.5 * (1 - 1 / factor)
    reach = 4 / stretch
    first = np.floor(centre - reach / 2)
    index = first[:, None] + np.arange(math.ceil(reach) + 2)
    weights = stretch * _keys(stretch * (centre[:, None] - index))
    weights /= weights.sum(1, keepdims=True)
    used = weights.any(0)
    return weights[:, used], _inside(index[:, used].astype(np.int64) - 1, length, border)


def _keys(t: Floats) -> Floats:
    """Return Keys' cubic convolution function with a = −1/2."""
    t = np.abs(t)
    t2, t3 = t**2, t**3
    near, far = 1.5 * t3 - 2.5 * t2 + 1, -0.5 * t3 + 2.5 * t2 - 4 * t + 2
    return np.where(t <= 1, near, np.where(t <= 2, far, 0.0))
