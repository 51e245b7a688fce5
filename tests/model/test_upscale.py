"""The upscale command: output files, alpha channels, colour profiles, and protection of existing files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from helpers import photograph
from PIL import Image as Pillow
from PIL import ImageCms

from loader.errors import ShardsError
from loader.resize.imresize import enlarge
from model.enlarge import alpha, tile_size, upscale
from model.enlarge.alpha import enlarge_alpha
from model.enlarge.pictures import Picture, encode_picture, read_picture
from model.enlarge.upscale import main
from model.enlarge.upscalers import network_upscaler
from model.metrics import Image
from model.shufflemixer import ShuffleMixer
from prep.images.faults import ImageError


@pytest.fixture(scope="module")
def network() -> ShuffleMixer:
    torch.manual_seed(0)
    return ShuffleMixer(8, 3, 1, 2, scale=2).eval()


@pytest.fixture
def weights(network: ShuffleMixer, tmp_path: Path) -> Path:
    path = tmp_path / "weights.pt"
    torch.save({"params": network.state_dict()}, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with pictures `a.png` and `ü.jpg`, a hidden picture, a text file and a subfolder."""
    place = tmp_path / "pictures"
    (place / "inner").mkdir(parents=True)
    Pillow.fromarray(photograph(24, 30)).save(place / "a.png")
    Pillow.fromarray(photograph(20, 16, seed=1)).save(place / "ü.jpg")
    Pillow.fromarray(photograph(20, 16)).save(place / ".hidden.png")
    Pillow.fromarray(photograph(20, 16)).save(place / "inner" / "b.png")
    (place / "notes.txt").write_text("nothing")
    return place


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def pixels(path: Path) -> Image:
    with Pillow.open(path) as picture:
        return np.asarray(picture)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def transparent(height: int, width: int) -> Image:
    """Return RGBA (H, W, 4) with alpha rising from left to right."""
    alpha = np.linspace(0, 255, width).astype(np.uint8)[None].repeat(height, axis=0)
    return np.dstack([photograph(height, width), alpha])


def test_result_is_written_next_to_the_picture(folder: Path, weights: Path, network: ShuffleMixer) -> None:
    result = run(folder / "a.png", "--checkpoint", weights, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert f"{folder / 'a.png'} -> {folder / 'a_x2.png'}  30 x 24 -> 60 x 48" in result.stdout
    expected = network_upscaler(network, torch.device("cpu"))(photograph(24, 30))
    assert np.array_equal(pixels(folder / "a_x2.png"), expected)
    assert np.array_equal(pixels(folder / "a.png"), photograph(24, 30))


def test_results_in_a_folder_are_not_enlarged_again(folder: Path, weights: Path) -> None:
    before = names(folder)
    assert run(folder, "--checkpoint", weights).exit_code == 0
    assert sorted({*names(folder)} - {*before}) == ["a_x2.png", "ü_x2.png"]
    after = names(folder)
    again = run(folder, "--checkpoint", weights)  # results are not inputs
    assert again.exit_code == 1
    assert f"{folder / 'a.png'}: {folder / 'a_x2.png'} exists; use --overwrite" in again.stderr
    assert run(folder, "--checkpoint", weights, "--overwrite").exit_code == 0
    assert names(folder) == after


def test_out_is_a_folder_or_a_file(folder: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "place"
    assert run(folder / "a.png", folder / "ü.jpg", "--checkpoint", weights, "--out", out).exit_code == 0
    assert names(out) == ["a_x2.png", "ü_x2.png"]
    for suffix in (".jpg", ".webp", ".bmp", ".tif", ".PNG"):
        file = tmp_path / f"large{suffix}"
        assert run(folder / "a.png", "--checkpoint", weights, "--out", file).exit_code == 0
        difference = pixels(file).astype(int) - pixels(out / "a_x2.png")
        assert np.abs(difference).mean() < (3 if suffix == ".jpg" else 1e-9)


def test_tiles_equal_the_whole(folder: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for number, tile in enumerate((100, 7, "auto")):
        if number == 2:
            monkeypatch.setattr(tile_size, "MEMORY_BUDGET", 0)
            monkeypatch.setattr(tile_size, "MIN_TILE", 9)
        out = tmp_path / f"{number}.png"
        assert run(folder / "a.png", "--checkpoint", weights, "--out", out, "--tile", tile).exit_code == 0
        made.append(pixels(out).astype(int))
    assert np.abs(made[1] - made[0]).max() <= 1
    assert np.abs(made[2] - made[0]).max() <= 1
    ensemble = tmp_path / "ensemble.png"
    assert run(folder / "a.png", "--checkpoint", weights, "--out", ensemble, "--self-ensemble").exit_code == 0
    assert not np.array_equal(pixels(ensemble), made[0])


def test_alpha_is_kept(folder: Path, weights: Path, network: ShuffleMixer) -> None:
    rgba = transparent(24, 30)
    Pillow.fromarray(rgba).save(folder / "t.png")
    assert run(folder / "t.png", "--checkpoint", weights, "--device", "cpu").exit_code == 0
    made = pixels(folder / "t_x2.png")
    assert np.array_equal(made[..., 3], enlarge(rgba[..., 3], 2))
    assert np.array_equal(made[..., :3], network_upscaler(network, torch.device("cpu"))(rgba[..., :3]))
    result = run(folder / "t.png", "--checkpoint", weights, "--out", folder / "t.jpg")
    assert result.exit_code == 1
    assert "expected an opaque picture for JPEG" in result.stderr
    assert not (folder / "t.jpg").exists()


def test_alpha_in_strips_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    plane = np.ascontiguousarray(photograph(41, 30)[..., 0])
    monkeypatch.setattr(alpha, "STRIP", 150)
    for scale in (2, 3, 4):
        assert np.array_equal(enlarge_alpha(plane, scale), enlarge(plane, scale))


def test_bad_pictures_are_skipped(folder: Path, weights: Path, tmp_path: Path) -> None:
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:600])
    Pillow.fromarray(transparent(20, 20)).save(folder / "cut2.png")
    (folder / "cut2.png").write_bytes((folder / "cut2.png").read_bytes()[:-200])
    (folder / "text.png").write_text("nothing")
    cv2.imwrite(str(folder / "deep.png"), np.full((20, 20, 4), 7777, np.uint16))
    (tmp_path / "empty").mkdir()
    sources = [tmp_path / "absent.png", tmp_path / "empty", folder / "notes.txt", folder]
    result = run(*sources, "--checkpoint", weights, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert names(tmp_path / "out") == ["a_x2.png", "ü_x2.png"]
    errors = result.stderr.splitlines()
    for error, (name, message) in zip(
        errors,
        [
            ("absent.png", "got no such file"),
            ("empty", "expected a folder with images"),
            ("notes.txt", "got '.txt'"),
            ("cut.png", "damaged"),
            ("cut2.png", "damaged"),
            ("deep.png", "expected 8 bits per channel, got 16"),
            ("text.png", "got something else, or a damaged header"),
        ],
        strict=True,
    ):
        assert error.startswith("Error: ")
        assert name in error
        assert message in error


def test_inputs_and_results_are_never_replaced(folder: Path, weights: Path, tmp_path: Path) -> None:
    before = (folder / "a.png").read_bytes()
    link = tmp_path / "link"
    link.symlink_to(folder)
    for out in (folder / "a.png", link / "a.png"):
        result = run(folder / "a.png", "--checkpoint", weights, "--out", out, "--overwrite")
        assert result.exit_code == 1
        assert "is an input file" in result.stderr
    assert (folder / "a.png").read_bytes() == before

    Pillow.fromarray(photograph(10, 10)).save(folder / "a.bmp")
    result = run(folder, "--checkpoint", weights, "--overwrite")
    assert result.exit_code == 1
    assert result.stderr.count("was already written for another image") == 1
    assert pixels(folder / "a_x2.png").shape == (20, 20, 3)  # from a.bmp, the first

    (folder / "b_x2.png").mkdir()
    Pillow.fromarray(photograph(10, 10)).save(folder / "b.png")
    result = run(folder / "b.png", "--checkpoint", weights, "--overwrite")
    assert result.exit_code == 1
    assert "expected a regular file or a new path, got a folder" in result.stderr


@pytest.mark.parametrize("allocate", [lambda size: torch.empty(size), lambda size: np.empty(size)])
def test_out_of_memory_suggests_smaller_tiles(
    allocate: Callable[[int], Any], folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        return lambda lr: allocate(1 << 55)

    monkeypatch.setattr(upscale, "network_upscaler", fail)
    result = run(folder / "a.png", "--checkpoint", weights)
    assert result.exit_code == 1
    assert "a.png: out of memory; try --tile 128 or less" in result.stderr


def test_usage_and_checkpoint_errors(folder: Path, weights: Path, tmp_path: Path) -> None:
    a = folder / "a.png"
    for arguments, code, message in (
        (["--checkpoint", weights], 2, "Missing argument"),
        ([a], 2, "--checkpoint"),
        ([a, "--checkpoint", weights, "--tile", "0"], 2, "expected auto or a number of LR pixels, got '0'"),
        ([a, "--checkpoint", weights, "--overlap", "4"], 2, "--overlap needs --tile"),
        ([folder, "--checkpoint", weights, "--out", "x.png"], 2, "expected a folder for several images"),
        ([a, "--checkpoint", weights, "--device", "abacus"], 2, "cannot use 'abacus'"),
        ([a, "--checkpoint", weights, "--scale", 4], 1, "expected a network for scale 4, got scale 2"),
        ([a, "--checkpoint", a], 1, "a.png: expected tensors written by torch.save"),
        ([a, "--checkpoint", weights, "--out", weights], 2, "weights.pt: expected a folder, or a name that ends"),
        ([a, "--checkpoint", weights, "--out", weights / "b"], 1, "weights.pt/b/a_x2.png: expected a writable path"),
        ([a, "--checkpoint", weights, "--out", tmp_path / "b.gif"], 2, "b.gif: expected a folder, or a name that ends"),
        ([a, "--checkpoint", weights, "--out", ""], 2, "expected a path, got an empty one"),
        (["", "--checkpoint", weights], 2, "expected a path, got an empty one"),
    ):
        result = run(*arguments)
        assert result.exit_code == code, result.output
        assert message in result.stderr
        assert "Traceback" not in result.output
    assert "a_x2.png" not in names(folder)


def test_small_overlap_is_a_warning(folder: Path, weights: Path) -> None:
    result = run(folder / "a.png", "--checkpoint", weights, "--tile", 8, "--overlap", 2)
    assert result.exit_code == 0
    assert "--overlap 2 is below the network's receptive radius of 5 pixels" in result.stderr


def test_palette_grey_and_orientation_are_read(tmp_path: Path) -> None:
    Pillow.fromarray(photograph(20, 30)).quantize(16).save(tmp_path / "palette.png", transparency=3)
    palette = read_picture(tmp_path / "palette.png")
    assert palette.alpha is not None
    assert set(np.unique(palette.alpha)) == {0, 255}
    grey = transparent(20, 30)[..., [0, 3]]
    Pillow.fromarray(grey).save(tmp_path / "grey.png")
    read = read_picture(tmp_path / "grey.png")
    assert np.array_equal(read.rgb, grey[..., :1].repeat(3, axis=2))
    assert read.alpha is not None
    assert np.array_equal(read.alpha, grey[..., 1])
    opaque = transparent(20, 30)
    opaque[..., 3] = 255
    Pillow.fromarray(opaque).save(tmp_path / "opaque.png")
    assert read_picture(tmp_path / "opaque.png").alpha is None
    exif = Pillow.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    rgba = transparent(20, 30)
    for name in ("turned.png", "turned.webp"):
        Pillow.fromarray(rgba).save(tmp_path / name, exif=exif, lossless=True, exact=True)  # PNG ignores both
        turned = read_picture(tmp_path / name)
        assert np.array_equal(turned.rgb, np.rot90(rgba[..., :3], -1))
        assert turned.alpha is not None
        assert np.array_equal(turned.alpha, np.rot90(rgba[..., 3], -1))


def test_animations_are_rejected(tmp_path: Path) -> None:
    frames = [Pillow.fromarray(transparent(20, 30)), Pillow.fromarray(transparent(20, 30)[::-1])]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="expected one image, got 2"):
        read_picture(tmp_path / "moving.webp")


def test_rgb_colour_profiles_are_kept(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Pillow.fromarray(photograph(20, 30)).save(tmp_path / "a.png", icc_profile=profile)
    picture = read_picture(tmp_path / "a.png")
    assert picture.profile == profile
    for suffix in (".png", ".jpg", ".webp", ".tif"):
        (tmp_path / f"b{suffix}").write_bytes(encode_picture(picture, tmp_path / f"b{suffix}"))
        assert read_picture(tmp_path / f"b{suffix}").profile == profile
    encode_picture(picture, tmp_path / "b.bmp")
    grey = profile[:16] + b"GRAY" + profile[20:]
    Pillow.fromarray(photograph(20, 30)[..., 0]).save(tmp_path / "grey.png", icc_profile=grey)
    assert read_picture(tmp_path / "grey.png").profile is None


def test_pictures_too_large_for_their_format_are_rejected() -> None:
    wide = Picture(np.zeros((1, 70_000, 3), np.uint8))
    for name in ("x.jpg", "x.webp"):
        with pytest.raises(ShardsError, match="expected a size that .* can hold, got 1 × 70000"):
            encode_picture(wide, Path(name))
    assert encode_picture(wide, Path("x.png"))
    with pytest.raises(ShardsError, match=r"x\.gif: expected a name that ends in one of"):
        encode_picture(wide, Path("x.gif"))
