"""The evaluate command: pairs, upscalers, output, errors, and published bicubic scores."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image as PillowImage
from torch import Tensor, nn

from loader import ImageDataset, ShardsError
from loader.resize.imresize import enlarge, imresize
from model.checkpoints import load_checkpoint
from model.enlarge.upscalers import bicubic_upscaler, network_upscaler
from model.evaluate.evaluate import main
from model.evaluate.pairs import ImagePair, read_pairs, shard_pairs
from model.evaluate.scoring import score_pairs
from model.metrics import Image, score
from model.shufflemixer import ShuffleMixer
from prep.cli import main as prep
from prep.images.decode import read_image

ROW = re.compile(r"(\S+)( -?\d+\.\d{4}){4}")


def photograph(height: int, width: int, seed: int = 0) -> Image:
    """Return smooth colours with noise, which enlarging restores only approximately."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([np.sin(rows / 7 + c) * np.cos(columns / (5 + c)) for c in range(3)], axis=-1)
    return (127 + 100 * waves + rng.normal(0, 6, waves.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture
def hr(tmp_path: Path) -> Path:
    """A folder of two images whose sizes are not multiples of 2 or 3."""
    folder = tmp_path / "hr"
    folder.mkdir()
    PillowImage.fromarray(photograph(65, 79)).save(folder / "a.png")
    PillowImage.fromarray(photograph(53, 49, seed=1)).save(folder / "b.png")
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A checkpoint of a small network at ×2."""
    torch.manual_seed(0)
    path = tmp_path / "weights.pt"
    torch.save({"params": ShuffleMixer(8, 3, 1, 2, scale=2).state_dict()}, path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


class Amplify(nn.Module):
    """Enlargement by repeated pixels, with a gain that exceeds [0, 1]."""

    def forward(self, lr: Tensor) -> Tensor:
        assert not self.training
        assert lr.dtype == torch.float32
        return (lr * 2 - 0.5).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def test_network_output_is_clamped_and_rounded() -> None:
    lr = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    network = Amplify()
    sr = network_upscaler(network, torch.device("cpu"))(lr)
    assert sr.dtype == np.uint8
    assert sr.shape == (32, 32, 3)
    expected = np.clip(np.round(2 * np.arange(256) - 127.5 + 1e-3), 0, 255).reshape(16, 16)
    np.testing.assert_allclose(sr[::2, ::2, 0], expected, atol=1)
    assert sr.min() == 0
    assert sr.max() == 255
    assert network.training


def test_lr_is_made_from_hr_cropped_to_a_multiple(hr: Path) -> None:
    pairs = {pair.name: pair for pair in read_pairs(hr, None, 3)}
    assert list(pairs) == ["a", "b"]
    cropped = photograph(65, 79)[:63, :78]
    assert np.array_equal(pairs["a"].hr, cropped)
    assert np.array_equal(pairs["a"].lr, imresize(cropped, 3))
    assert pairs["b"].lr.shape == (17, 16, 3)


def test_given_lr_is_read_by_stem(hr: Path, tmp_path: Path) -> None:
    lr = tmp_path / "lr"
    (lr / "X2").mkdir(parents=True)
    PillowImage.fromarray(photograph(32, 39, seed=5)).save(lr / "X2" / "ax2.png")
    PillowImage.fromarray(photograph(26, 24, seed=6)).save(lr / "X2" / "bx2.png")
    pairs = list(read_pairs(hr, lr, 2))
    assert [pair.name for pair in pairs] == ["a", "b"]
    assert np.array_equal(pairs[1].lr, photograph(26, 24, seed=6))

    rounded_up = photograph(27, 25)  # as MATLAB makes from uncropped HR
    PillowImage.fromarray(rounded_up).save(lr / "X2" / "bx2.png")
    assert np.array_equal(list(read_pairs(hr, lr, 2))[1].lr, rounded_up[:26, :24])
    PillowImage.fromarray(photograph(26, 26)).save(lr / "X2" / "bx2.png")
    with pytest.raises(ShardsError, match=r"bx2\.png: expected 26 . 24 .*got 26 . 26"):
        next(read_pairs(hr, lr, 2))
    (lr / "X2" / "bx2.png").unlink()
    with pytest.raises(ShardsError, match=r"\bb"):
        list(read_pairs(hr, lr, 2))


def test_shards_and_folder_give_the_same_pairs(hr: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    result = CliRunner().invoke(prep, ["build-shards", str(hr), "--scale", "3", "--out", str(out)])
    assert result.exit_code == 0, result.output
    for ours, theirs in zip(shard_pairs(ImageDataset(out, 3)), read_pairs(hr, None, 3), strict=True):
        assert ours.name == theirs.name
        assert np.array_equal(ours.lr, theirs.lr)
        assert np.array_equal(ours.hr, theirs.hr)


def test_score_pairs_scores_the_upscaler() -> None:
    image = photograph(40, 44)
    lr = imresize(image, 2)
    (scored,) = score_pairs(bicubic_upscaler(2), [ImagePair("x", lr, image)], border=2)
    assert scored.pair.name == "x"
    assert np.array_equal(scored.sr, enlarge(lr, 2))
    assert scored.scores == score(enlarge(lr, 2), image, border=2)
    tiny = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ShardsError, match="image small: SSIM needs 11 x 11"):
        list(score_pairs(bicubic_upscaler(2), [ImagePair("small", tiny[:4, :4], tiny)], border=2))


def test_bicubic_command(hr: Path) -> None:
    result = run("--hr", hr, "--scale", 2, "--bicubic")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "border cropped before scoring: 2 pixels on each side" in lines
    rows = [line.split() for line in lines[-3:]]
    assert [row[0] for row in rows] == ["a", "b", "mean"]
    assert all(ROW.fullmatch(line) for line in lines[-3:])
    for column in range(1, 5):
        assert float(rows[2][column]) == pytest.approx((float(rows[0][column]) + float(rows[1][column])) / 2, abs=1e-4)


def test_checkpoint_command_names_the_weights(hr: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    networks = [ShuffleMixer(8, 3, 1, 2, scale=2) for _ in range(2)]
    path = tmp_path / "weights.pt"
    torch.save({"params": networks[0].state_dict(), "params_ema": networks[1].state_dict()}, path)
    means = []
    for flags, key, network in (
        ([], "params_ema", networks[1]),
        (["--weights", "raw"], "params", networks[0]),
    ):
        result = run("--hr", hr, "--scale", 2, "--checkpoint", path, "--device", "cpu", *flags)
        assert result.exit_code == 0, result.output
        assert f"weights {key}," in result.stdout
        upscale = network_upscaler(network, torch.device("cpu"))
        first = next(score_pairs(upscale, read_pairs(hr, None, 2), border=2))
        assert f"a {first.scores.psnr_rgb:.4f} " in result.stdout
        means.append(result.stdout.splitlines()[-1])
    assert means[0] != means[1]


def scores_of(result: Result) -> list[list[float]]:
    assert result.exit_code == 0, result.output
    return [
        [float(number) for number in line.split()[1:]] for line in result.stdout.splitlines() if ROW.fullmatch(line)
    ]


def test_tiles_keep_the_scores_and_small_overlaps_warn(hr: Path, weights: Path) -> None:
    arguments = ["--hr", hr, "--scale", 2, "--checkpoint", weights]
    whole, tiles, seams = (run(*arguments, *flags) for flags in ([], ["--tile", 9], ["--tile", 9, "--overlap", 0]))
    assert "tiles of 9 LR pixels with an overlap of 5" in tiles.stdout
    np.testing.assert_allclose(scores_of(tiles), scores_of(whole), atol=2e-3)  # dB: rounding may change a value by 1
    assert not np.allclose(scores_of(seams), scores_of(whole), atol=2e-3)
    assert "--overlap 0 is below the network's receptive radius of 5 pixels" in seams.stderr


def test_self_ensemble_averages_before_rounding(hr: Path, weights: Path) -> None:
    result = run("--hr", hr, "--scale", 2, "--checkpoint", weights, "--self-ensemble", "--device", "cpu")
    network = load_checkpoint(weights).build()
    pair = next(read_pairs(hr, None, 2))
    lr = torch.from_numpy(pair.lr).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        views = [(turns, axes) for turns in range(4) for axes in ((), (-1,))]
        results = [torch.rot90(network(torch.rot90(lr.flip(f), t, (2, 3))), -t, (2, 3)).flip(f) for t, f in views]
        mean = torch.stack(results).mean(0)[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    expected = score(mean, pair.hr, border=2)
    np.testing.assert_allclose(scores_of(result)[0], [*vars(expected).values()], atol=1e-3)


def test_shards_and_folder_give_the_same_scores(hr: Path, weights: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    assert CliRunner().invoke(prep, ["build-shards", str(hr), "--scale", "2", "--out", str(shards)]).exit_code == 0
    arguments = ["--scale", 2, "--checkpoint", weights]
    ours, theirs = run("--shards", shards, *arguments), run("--hr", hr, *arguments)
    assert f"LR from shards {shards}, scale 2" in ours.stdout
    assert ours.stdout.splitlines()[-3:] == theirs.stdout.splitlines()[-3:]
    wrong = run("--shards", shards, "--scale", 3, "--bicubic")
    assert wrong.exit_code == 1
    assert "3" in wrong.stderr


def test_saved_images_are_those_scored(hr: Path, weights: Path, tmp_path: Path) -> None:
    saved, sheet = tmp_path / "new" / "results", tmp_path / "sheets" / "sheet.png"
    flags = ["--save", saved, "--sheet", sheet, "--sheet-rows", 1]
    result = run("--hr", hr, "--scale", 2, "--checkpoint", weights, *flags)
    rows = scores_of(result)
    assert sorted(path.name for path in saved.iterdir()) == ["a_x2.png", "b_x2.png"]
    for pair, row in zip(read_pairs(hr, None, 2), rows, strict=False):
        scores = score(read_image(saved / f"{pair.name}_x2.png"), pair.hr, border=2)
        assert row == pytest.approx([*vars(scores).values()], abs=1e-4)
    one = read_image(sheet)
    again = run("--hr", hr, "--scale", 2, "--checkpoint", weights, *flags[:-1], 2)
    assert again.exit_code == 0
    two = read_image(sheet)
    assert two.shape[0] > one.shape[0]
    assert np.array_equal(two[: one.shape[0]], one)


def test_json_matches_the_lines(hr: Path, weights: Path) -> None:
    arguments = ["--hr", hr, "--scale", 2, "--checkpoint", weights]
    facts = json.loads(run(*arguments, "--json").stdout)
    lines = run(*arguments).stdout.splitlines()
    assert facts["notes"] == lines[:3]
    assert list(facts["images"]) == ["a", "b"]
    for line, scores in zip(lines[-3:], [*facts["images"].values(), facts["mean"]], strict=True):
        assert line.split()[1:] == [f"{value:.4f}" for value in scores.values()]
    assert list(facts["mean"]) == ["psnr_rgb", "ssim_rgb", "psnr_y", "ssim_y"]


def test_infinite_psnr_is_null_in_json(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    PillowImage.new("RGB", (40, 40), (10, 20, 30)).save(tmp_path / "flat" / "a.png")
    result = run("--hr", tmp_path / "flat", "--scale", 2, "--bicubic", "--json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    facts = json.loads(result.stdout, parse_constant=refuse)
    assert facts["mean"]["psnr_y"] is None
    assert facts["mean"]["ssim_y"] == pytest.approx(1)


def test_truncated_image_fails_the_evaluation(hr: Path) -> None:
    (hr / "c.png").write_bytes((hr / "a.png").read_bytes()[:2000])
    result = run("--hr", hr, "--scale", 2, "--bicubic")
    assert result.exit_code == 1
    assert "c.png: expected a complete image" in result.stderr
    assert "mean" not in result.stdout


def test_usage_errors(hr: Path, weights: Path) -> None:
    for arguments, message in (
        (["--hr", hr, "--scale", 2], "give either --checkpoint FILE or --bicubic"),
        (["--hr", hr, "--scale", 2, "--bicubic", "--checkpoint", "x"], "give either"),
        (["--hr", hr, "--scale", 5, "--bicubic"], "expected one of (2, 3, 4, 8), got 5"),
        (["--scale", 2, "--bicubic"], "give either --hr DIR or --shards DIR"),
        (["--hr", hr, "--shards", hr, "--scale", 2, "--bicubic"], "give either --hr DIR or --shards DIR"),
        (["--lr", hr, "--shards", hr, "--scale", 2, "--bicubic"], "--lr goes with --hr"),
        (["--hr", hr, "--scale", 2, "--bicubic", "--tile", 8], "--tile and --sheet need --checkpoint"),
        (["--hr", hr, "--scale", 2, "--bicubic", "--sheet", "x.png"], "--tile and --sheet need --checkpoint"),
        (["--hr", hr, "--scale", 2, "--checkpoint", weights, "--sheet", "x.jpg"], "expected a name that ends in .png"),
        (["--hr", "", "--scale", 2, "--bicubic"], "expected a path, got an empty one"),
        (["--hr", hr, "--scale", 2, "--checkpoint", ""], "expected a path, got an empty one"),
        (["--hr", hr, "--scale", 2, "--checkpoint", "x", "--overlap", 8], "--overlap needs --tile"),
        (["--hr", hr, "--scale", 2, "--checkpoint", "x", "--tile", 0], "--tile"),
        (["--hr", hr, "--scale", 2, "--checkpoint", weights, "--device", "abacus"], "cannot use 'abacus'"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert message in result.stderr


def test_bad_input_is_a_one_line_error(hr: Path, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.png").mkdir()
    (tmp_path / "text.pt").write_text("nothing")
    torch.save(ShuffleMixer(8, 3, 1, 2, scale=4).state_dict(), tmp_path / "x4.pt")
    for arguments, message in (
        (["--hr", tmp_path / "absent", "--bicubic"], "absent"),
        (["--hr", tmp_path / "empty", "--bicubic"], "empty"),
        (["--hr", hr, "--checkpoint", tmp_path / "absent.pt"], "absent.pt: no such file"),
        (["--hr", hr, "--checkpoint", tmp_path / "text.pt"], "got a damaged file or other content"),
        (["--hr", hr, "--checkpoint", tmp_path / "x4.pt"], "expected a network for scale 2, got scale 4"),
        (["--shards", hr, "--bicubic"], "index.json"),
        (["--hr", hr, "--bicubic", "--save", hr], f"expected a path outside the input {hr}"),
        (["--hr", hr, "--bicubic", "--save", hr / "inner"], f"expected a path outside the input {hr}"),
        (["--hr", hr, "--bicubic", "--save", tmp_path / "text.pt"], "text.pt: File exists"),
        (["--hr", hr, "--checkpoint", weights, "--sheet", tmp_path / "text.pt" / "x.png"], "text.pt: File exists"),
        (
            ["--hr", hr, "--checkpoint", weights, "--sheet", tmp_path / "empty.png"],
            "empty.png: expected a regular",
        ),
        (["--hr", hr, "--checkpoint", weights, "--sheet", hr / "sheet.png"], f"expected a path outside the input {hr}"),
        (["--hr", hr, "--checkpoint", weights, "--sheet", tmp_path / "weights.pt/x.png"], "weights.pt: File exists"),
    ):
        result = run(*arguments, "--scale", 2)
        assert result.exit_code == 1
        assert message in result.stderr
        assert "Traceback" not in result.output


def test_runs_as_a_module(hr: Path) -> None:
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "model.evaluate",
        "--hr",
        str(hr),
        "--scale",
        "2",
        "--bicubic",
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].startswith("mean ")


@pytest.mark.parametrize(("scale", "psnr", "ssim"), [(2, 33.66, 0.9299), (3, 30.39, 0.8682), (4, 28.42, 0.8104)])
@pytest.mark.parametrize("given", [True, False])
def test_set5_bicubic_matches_published_scores(scale: int, psnr: float, ssim: float, given: bool) -> None:
    shared = os.environ.get("SRSHARDS_SHARED")
    if not shared:
        pytest.skip("SRSHARDS_SHARED is not set")
    set5 = Path(shared, "data", "Set5")
    lr = ["--lr", set5 / "LR_bicubic"] if given else []
    result = run("--hr", set5 / f"HR_mod{scale}", *lr, "--scale", scale, "--bicubic")
    assert result.exit_code == 0, result.output
    mean = result.stdout.splitlines()[-1].split()
    assert float(mean[3]) == pytest.approx(psnr, abs=0.02)
    assert float(mean[4]) == pytest.approx(ssim, abs=0.0012)
