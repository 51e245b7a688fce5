"""The trainer: its stream of samples, steps, checkpoints, resuming, output and errors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image as PillowImage

import train
from model.checkpoints import CheckpointError, load_checkpoint
from model.evaluate import main as evaluate
from model.shufflemixer import ShuffleMixer
from prep.cli import main as prep

LINE = re.compile(
    r"iteration (\d+)/6  loss \d\.\d{5}  [\d.]+ images/s  \d+\.\d{4} s/step  "
    r"\d+\.\d% waiting for data  \(l1 \d\.\d{5}, fft \d+\.\d{4}\)"
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images that a network can learn something from; `small` is smaller than the others."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(4)
    for name, height, width in (("one", 64, 80), ("two", 72, 60), ("small", 28, 40)):
        rows, columns = np.mgrid[:height, :width]
        edges = 127 + 90 * np.sign(np.sin(rows / 6 + rng.random())[..., None] * np.cos(columns / 7)[..., None])
        image = edges + rng.normal(0, 8, (height, width, 3))
        PillowImage.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def shards(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "train"
    result = CliRunner().invoke(prep, ["build-shards", str(photographs), "--scale", "2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def run(shards: Path, tmp_path: Path) -> Callable[..., Result]:
    """Run train.py for 6 small iterations into tmp_path/OUT; later flags win over earlier ones."""

    def call(out: str, *flags: str | int) -> Result:
        common = ["--shards", shards, "--scale", 2, "--lr-patch", 12, "--batch-size", 2, "--workers", 1]
        common += ["--iterations", 6, "--log-every", 2, "--device", "cpu", "--out", tmp_path / out]
        return CliRunner().invoke(train.main, [str(word) for word in [*common, *flags]])

    return call


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def config(**changes: Any) -> train.Config:
    settings: dict[str, Any] = {"shards": "s", "scale": 2, "out": "o"}
    return train.Config(**settings | changes)


def test_average_of_weights_is_warmed_up() -> None:
    state = train.new_state(config(), torch.device("cpu"))
    before = state.network.tail.weight.detach().clone()
    batch = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 16, 16)
    train.train_step(state, batch, config())
    after = state.network.tail.weight.detach()
    assert not torch.equal(before, after)
    torch.testing.assert_close(state.ema.tail.weight, before + (1 - 2 / 11) * (after - before))
    state.iteration = 10**6
    average = state.ema.tail.weight.clone()
    train.train_step(state, batch, config(ema_decay=0.5))
    torch.testing.assert_close(state.ema.tail.weight, (average + state.network.tail.weight.detach()) / 2)


def test_steps_learn() -> None:
    settings = config(learning_rate=2e-3)
    state = train.new_state(settings, torch.device("cpu"))
    hr = torch.rand(2, 3, 8, 8).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    batch = hr[:, :, ::2, ::2].contiguous(), hr
    losses = [train.train_step(state, batch, settings).total.item() for _ in range(60)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_run_reports_logs_and_saves(
    run: Callable[..., Result], shards: Path, photographs: Path, tmp_path: Path
) -> None:
    result = run("a", "--valid-shards", str(shards), "--validate-every", 3, "--checkpoint-every", 4)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [match[1] for line in lines if (match := LINE.fullmatch(line))] == ["2", "3", "4", "6"]
    assert len([line for line in lines if line.startswith("validation at iteration")]) == 2

    log = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in log] == [2, 3, 3, 4, 6, 6]
    assert all(0 <= entry["data_wait"] <= 1 for entry in log if "loss" in entry)
    assert {key for key in log[-1] if key != "iteration"} == {"psnr_rgb", "ssim_rgb", "psnr_y", "ssim_y"}

    path = tmp_path / "a" / "checkpoints" / "last.pt"
    content = read(path)
    assert content["iteration"] == 6
    assert content["sample"] == 12
    assert content["config"]["fft_weight"] == 0.1
    assert [entry.name for entry in path.parent.iterdir()] == ["last.pt"]
    command = ["--hr", str(photographs), "--scale", "2", "--checkpoint", str(path), "--device", "cpu"]
    mean = CliRunner().invoke(evaluate, command).stdout.splitlines()[-1].split()
    assert float(mean[3]) == pytest.approx(log[-1]["psnr_y"], abs=1e-3)


def test_resumed_equals_uninterrupted(run: Callable[..., Result], tmp_path: Path) -> None:
    assert run("whole").exit_code == 0
    assert run("parts", "--iterations", 3).exit_code == 0
    result = run("parts", "--resume", "auto")
    assert result.exit_code == 0, result.output
    assert "3 iterations done" in result.stdout
    whole, parts = (read(tmp_path / out / "checkpoints" / "last.pt") for out in ("whole", "parts"))
    for key in ("params", "params_ema"):
        assert all(torch.equal(whole[key][name], parts[key][name]) for name in whole[key])
    assert parts["iteration"] == 6


def test_seed_decides_everything(run: Callable[..., Result], tmp_path: Path) -> None:
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(out, "--seed", seed, "--iterations", 2).exit_code == 0
    a, b, c = (load_checkpoint(tmp_path / out / "checkpoints" / "last.pt").weights for out in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["tail.weight"], c["tail.weight"])


def test_resume_auto_starts_afresh_where_there_is_nothing(run: Callable[..., Result], tmp_path: Path) -> None:
    log = tmp_path / "a" / "metrics.jsonl"
    log.parent.mkdir()
    log.write_text("left by a run that was killed before its first checkpoint")
    result = run("a", "--resume", "auto", "--iterations", 1)
    assert result.exit_code == 0
    assert "0 iterations done" in result.stdout
    assert [json.loads(line)["iteration"] for line in log.read_text().splitlines()] == [1]


def test_a_run_is_not_overwritten(run: Callable[..., Result], tmp_path: Path) -> None:
    assert run("a", "--iterations", 1).exit_code == 0
    before = (tmp_path / "a" / "checkpoints" / "last.pt").read_bytes()
    result = run("a", "--iterations", 2)
    assert result.exit_code == 1
    assert "a run is already there; add --resume auto" in result.stderr
    assert (tmp_path / "a" / "checkpoints" / "last.pt").read_bytes() == before


def test_wrong_checkpoints_are_not_resumed(run: Callable[..., Result], tmp_path: Path) -> None:
    assert run("a", "--iterations", 1).exit_code == 0
    whole = tmp_path / "a" / "checkpoints" / "last.pt"
    torch.save({"params": ShuffleMixer.preset("tiny", 2).state_dict()}, tmp_path / "weights.pt")
    for flags, message in (
        (["--resume", tmp_path / "absent.pt"], "no such file"),
        (["--resume", tmp_path / "weights.pt"], "missing or wrong: 'params_ema'"),
        (
            ["--resume", whole, "--model", "base"],
            "expected a checkpoint of train.py with ShuffleMixerConfig(features=64",
        ),
    ):
        result = run("b", *flags)
        assert result.exit_code == 1
        assert message in result.stderr
        assert "Traceback" not in result.output


def test_failed_save_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = train.new_state(config(), torch.device("cpu"))
    path = tmp_path / "last.pt"
    train.save_checkpoint(path, state, config())
    before = path.read_bytes()

    def full(content: object, file: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        train.save_checkpoint(path, state, config())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_learning_rate_of_a_resumed_run_is_the_flags(tmp_path: Path) -> None:
    state = train.new_state(config(), torch.device("cpu"))
    train.train_step(state, (torch.rand(1, 3, 8, 8), torch.rand(1, 3, 16, 16)), config())
    train.save_checkpoint(tmp_path / "last.pt", state, config())
    other = train.new_state(config(seed=5), torch.device("cpu"))
    train.restore(tmp_path / "last.pt", other, config(learning_rate=1e-3))
    assert other.iteration == 1
    assert [group["lr"] for group in other.optimiser.param_groups] == [1e-3]
    assert torch.equal(other.network.tail.weight, state.network.tail.weight)
    with pytest.raises(CheckpointError, match=r"absent\.pt: no such file"):
        train.restore(tmp_path / "absent.pt", other, config())


def test_small_images_are_named_and_can_be_skipped(run: Callable[..., Result]) -> None:
    result = run("a", "--lr-patch", 20)
    assert result.exit_code == 1
    assert "small" in result.stderr
    assert "--skip-small" in result.stderr
    result = run("a", "--lr-patch", 20, "--skip-small", "--iterations", 1)
    assert result.exit_code == 0, result.output


def test_bad_input_is_one_clear_line(run: Callable[..., Result], tmp_path: Path) -> None:
    for flags, message in (
        (["--shards", tmp_path / "absent"], "absent"),
        (["--scale", 4], "4"),
        (["--valid-shards", tmp_path / "absent-too"], "absent-too"),
    ):
        result = run("a", *flags)
        assert result.exit_code == 1
        assert message in result.stderr
        assert "Traceback" not in result.output
        assert not (tmp_path / "a").exists()


def test_a_damaged_shard_is_one_clear_line(run: Callable[..., Result], shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "copy")
    shard = next((tmp_path / "copy").glob("*.h5"))
    shard.write_bytes(shard.read_bytes()[:-1])
    result = run("a", "--shards", str(tmp_path / "copy"))
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "length: expected" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--iterations", "0"], "--iterations must be at least 1"),
        (["--learning-rate", "nan"], "--learning-rate must be at least 0 and below inf, got nan"),
        (["--ema-decay", "1"], "--ema-decay must be at least 0 and below 1, got 1.0"),
        (["--scale", "8"], "scale must be one of (2, 3, 4), got 8"),
        (["--model", "huge"], "huge"),
        (["--batch-size", "many"], "many"),
        (["--device", "abacus"], "cannot use 'abacus'"),
    ],
)
def test_usage_errors(run: Callable[..., Result], flags: list[str], message: str) -> None:
    result = run("a", *flags)
    assert result.exit_code == 2
    assert message in result.stderr


def test_defaults_are_the_published_recipe() -> None:
    defaults = config()
    assert (defaults.batch_size, defaults.lr_patch, defaults.learning_rate) == (64, 64, 5e-4)
    assert (defaults.fft_weight, defaults.ema_decay, defaults.iterations) == (0.1, 0.999, 300_000)
    assert train.ADAM_BETAS == (0.9, 0.99)
