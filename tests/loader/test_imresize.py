"""Downscaling compared with MATLAB's results, with its arithmetic in doubles, and with pinned digests."""

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import photograph
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loader.format.layout import SCALES
from loader.resize import imresize as module
from loader.resize.imresize import Border, Pixels, Rounding, enlarge, imresize
from prep.images.decode import read_image


@pytest.fixture(params=["compiled", "fallback"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrink uint8 with and without the compiled kernel."""
    if request.param == "fallback":
        monkeypatch.setattr(module, "resize_kernel", None)
    elif module.resize_kernel is None:
        pytest.skip("needs the compiled kernel")


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.usefixtures("kernel")
def test_published_images(shared: Path, scale: int) -> None:
    """The LR images of Set5 were made by MATLAB before R2015b."""
    files = sorted((shared / f"data/Set5/HR_mod{scale}").glob("*.png"))
    assert len(files) == 5
    for file in files:
        lr = read_image(shared / f"data/Set5/LR_bicubic/X{scale}/{file.stem}x{scale}.png")
        np.testing.assert_array_equal(imresize(read_image(file), scale, border="replicate"), lr)


def in_doubles(image: Pixels, scale: int, border: str) -> Pixels:
    """Return MATLAB's documented computation for uint8: each pass in doubles, then rounded."""
    return module._float_resize(image, 1 / scale, "uint8", border)


@pytest.mark.usefixtures("kernel")
@settings(max_examples=60, deadline=None)
@given(
    image=hnp.arrays(
        np.uint8,
        st.tuples(st.integers(1, 90), st.integers(1, 90), st.sampled_from([1, 3, 4])),
        elements=st.sampled_from([0, 1, 2, 127, 128, 254, 255]),
    ),
    scale=st.sampled_from(SCALES),
    border=st.sampled_from(["symmetric", "replicate"]),
)
def test_integers_equal_doubles(image: Pixels, scale: int, border: Border) -> None:
    small = imresize(image, scale, border=border)
    assert small.shape == (-(-image.shape[0] // scale), -(-image.shape[1] // scale), image.shape[2])
    np.testing.assert_array_equal(small, in_doubles(image, scale, border))


@pytest.mark.usefixtures("kernel")
def test_halves_are_rounded_up() -> None:
    """Images of few grey levels have sums of exactly one half, which other rounding rules get wrong."""
    rng = np.random.default_rng(3)
    image = rng.integers(0, 2, (512, 512), np.uint8) * 255
    weights = np.array([-3, -9, 29, 111, 111, 29, -9, -3])
    windows = np.lib.stride_tricks.sliding_window_view(image.astype(int), 8, axis=0)[1:-1:2]
    sums = windows @ weights
    assert ((sums % 256 == 128) & (sums > 0)).any()
    np.testing.assert_array_equal(imresize(image, 2), in_doubles(image, 2, "symmetric"))


# SHA-256 of results for photograph(157, 211): (scale, rounding, border).
DIGESTS: dict[tuple[int, Rounding, Border], str] = {
    (2, "uint8", "symmetric"): "db5b419cd32150e7",
    (2, "uint8", "replicate"): "c7f89eb48f4e383f",
    (2, "double", "symmetric"): "22abffc971a99d23",
    (2, "double", "replicate"): "c15f6375439d7b8a",
    (3, "uint8", "symmetric"): "0782e84d08c522c7",
    (3, "uint8", "replicate"): "1e580ad6bbf93299",
    (3, "double", "symmetric"): "5260379215708043",
    (3, "double", "replicate"): "9b91ec8047b50177",
    (4, "uint8", "symmetric"): "6cfe68d35b93d16f",
    (4, "uint8", "replicate"): "54b26784a07c7bf5",
    (4, "double", "symmetric"): "b597c38bdc2ee784",
    (4, "double", "replicate"): "f02d046678682dcb",
    (8, "uint8", "symmetric"): "f9314021d9637156",
    (8, "uint8", "replicate"): "f85043433ffcdd6d",
    (8, "double", "symmetric"): "9ed83cbbb9a5f884",
    (8, "double", "replicate"): "04803f4bed7275df",
}


def digest(scale: int, rounding: Rounding, border: Border) -> str:
    small = imresize(photograph(157, 211), scale, rounding=rounding, border=border)
    return hashlib.sha256(small.tobytes()).hexdigest()[:16]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("case", DIGESTS)
def test_pinned_digests(case: tuple[int, Rounding, Border]) -> None:
    assert digest(*case) == DIGESTS[case]


def test_published_weights() -> None:
    numerators, denominator = module._weights(4)
    half = [-7, -45, -75, -49, 93, 399, 745, 987]
    assert denominator == 4096
    assert numerators.tolist() == half + half[::-1]


def test_number_of_dimensions_is_kept() -> None:
    grey = photograph(40, 50)[..., 0]
    assert imresize(grey, 2).shape == (20, 25)
    np.testing.assert_array_equal(imresize(grey, 2), imresize(grey[..., None], 2)[..., 0])


def test_strided_views() -> None:
    image = photograph(60, 80)
    np.testing.assert_array_equal(imresize(image[::-1, ::2], 3), imresize(image[::-1, ::2].copy(), 3))


def test_border_rules_differ_only_at_the_edge() -> None:
    image = photograph(80, 80)
    differs = imresize(image, 4, border="symmetric") != imresize(image, 4, border="replicate")
    assert differs.any()
    assert not differs[2:-2, 2:-2].any()


def test_rounding_modes_differ() -> None:
    image = photograph(80, 80)
    once, twice = imresize(image, 4, rounding="double"), imresize(image, 4)
    difference = np.abs(once.astype(int) - twice)
    assert 0 < difference.max() <= 1


def test_enlarging_preserves_ramps() -> None:
    """Cubic convolution reproduces straight lines: away from the border, a ramp stays a ramp."""
    ramp = np.tile(np.arange(0, 120, 4, dtype=np.uint8), (9, 1))
    large = enlarge(ramp, 2)
    assert large.shape == (18, 60)
    np.testing.assert_array_equal(large[9, 8:-8], np.arange(60)[8:-8] * 2 - 1)
    np.testing.assert_array_equal(enlarge(np.full((5, 7, 3), 200, np.uint8), 3), np.full((15, 21, 3), 200))


def test_shrinking_undoes_enlarging() -> None:
    image = cv2.GaussianBlur(photograph(60, 60), (0, 0), 3).astype(np.uint8)
    again = imresize(enlarge(image, 4), 4)
    assert np.abs(again.astype(int) - image)[4:-4, 4:-4].max() <= 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((4, 4, 3))}, "image: expected a uint8 array .* got float64"),
        ({"image": np.zeros((4,), np.uint8)}, r"image: .* got uint8 \(4,\)"),
        ({"image": np.zeros((0, 4), np.uint8)}, "image: "),
        ({"image": [1, 2]}, "image: .* got list"),
        ({"scale": 5}, r"scale: expected one of \(2, 3, 4, 8\), got 5"),
        ({"scale": 2.0}, r"scale: expected one of \(2, 3, 4, 8\), got 2.0"),
        ({"scale": "2"}, r"scale: expected one of \(2, 3, 4, 8\), got '2'"),
        ({"rounding": "float"}, "rounding: .* got 'float'"),
        ({"border": "wrap"}, "border: .* got 'wrap'"),
    ],
)
@pytest.mark.parametrize("function", [imresize, enlarge])
def test_bad_arguments(function: object, change: dict[str, object], message: str) -> None:
    arguments = {"image": np.zeros((4, 4, 3), np.uint8), "scale": 2, "rounding": "uint8", "border": "symmetric"}
    arguments |= change
    with pytest.raises(ValueError, match=message):
        function(arguments.pop("image"), arguments.pop("scale"), **arguments)  # type: ignore[operator]
