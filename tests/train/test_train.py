"""The trainer: steps, checkpoints, resuming, output and errors."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image as PillowImage
from trainings import command, start

import train
from model.checkpoints import load_checkpoint
from model.evaluate.evaluate import main as evaluate
from model.losses import Losses
from model.run_log import read_log
from model.shufflemixer import ShuffleMixer
from model.training import saving
from model.training.ranks import Ranks
from model.training.settings import Config
from model.training.state import ADAM_BETAS, State, from_checkpoint, new_state, to_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

LINE = re.compile(
    r"iteration (\d+)/6  loss \d\.\d{5} \(l1 \d\.\d{5}, fft \d+\.\d{5}\)  learning rate \d\.\d\de-\d\d  "
    r"[\d.]+ images/s  \d+\.\d{4} s/step  \d+\.\d% waiting for data  \d+:\d\d:\d\d left  peak memory \d+\.\d\d GiB"
)
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def run(training_shards: Path, tmp_path: Path) -> Callable[..., Result]:
    """Run train.py for 6 small iterations into tmp_path/OUT; later flags win over earlier ones."""

    def call(out: str, *flags: str | int) -> Result:
        common = ["--shards", training_shards, "--scale", 2, "--lr-patch", 12, "--batch-size", 2, "--workers", 1]
        common += ["--iterations", 6, "--log-every", 2, "--device", "cpu", "--out", tmp_path / out]
        return CliRunner().invoke(train.main, [str(word) for word in [*common, *flags]])

    return call


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def config(**changes: Any) -> Config:
    settings: dict[str, Any] = {"shards": "s", "scale": 2, "out": "o"}
    return Config(**settings | changes)


def random_batch(samples: int, side: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a random uint8 batch."""
    generator = torch.Generator().manual_seed(seed)
    lr, hr = (
        torch.randint(0, 256, (samples, size, size, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
        for size in (side, 2 * side)
    )
    return lr, hr


def test_ema_is_warmed_up() -> None:
    state = new_state(config(), ALONE)
    before = state.network.tail.weight.detach().clone()
    train.train_step(state, random_batch(1), config(), ALONE)
    after = state.network.tail.weight.detach()
    assert not torch.equal(before, after)
    torch.testing.assert_close(state.ema.tail.weight, before + (1 - 2 / 11) * (after - before))
    state.iteration = 10**6
    average = state.ema.tail.weight.clone()
    train.train_step(state, random_batch(1), config(ema_decay=0.5), ALONE)
    torch.testing.assert_close(state.ema.tail.weight, (average + state.network.tail.weight.detach()) / 2)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_steps_reduce_the_loss(precision: str) -> None:
    settings = config(learning_rate=2e-3, precision=precision)
    state = new_state(settings, ALONE)
    lr, _ = random_batch(2)
    batch = lr, lr.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    done = [train.train_step(state, batch, settings, ALONE) for _ in range(60)]
    losses = [one.total.item() for one in done if one is not None]
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("weights", [{}, {"l1_weight": 0.0, "charbonnier_weight": 1.0, "fft_amplitude_weight": 0.1}])
def test_micro_batches_equal_one_batch(micro_batch: int, recompute: bool, weights: dict[str, float]) -> None:
    settings = config(**weights)
    whole, parts = new_state(settings, ALONE), new_state(config(activation_checkpointing=recompute), ALONE)
    parts.micro_batch = micro_batch
    a, b = (train.train_step(state, random_batch(5), settings, ALONE) for state in (whole, parts))
    assert a is not None
    assert b is not None
    torch.testing.assert_close(a.total, b.total)
    assert list(a.parts) == list(b.parts)
    for one, other in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("limit", "found"), [(100, 10), (9, 5), (5, 5), (3, 3), (2, 2), (1, 1)])
def test_micro_batch_auto_finds_what_fits(limit: int, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    add_gradients = train.add_gradients

    def limited(forward: Any, state: State, batch: tuple[torch.Tensor, torch.Tensor], *rest: Any) -> Losses:
        if len(batch[0]) > limit:
            raise torch.OutOfMemoryError("a limit made for this test")
        return add_gradients(forward, state, batch, *rest)

    monkeypatch.setattr(train, "add_gradients", limited)
    settings = config(batch_size=10, lr_patch=8, micro_batch="auto")
    state = new_state(settings, ALONE)
    before = copy.deepcopy(state.network.state_dict())
    assert train.choose_micro_batch(state, settings, ALONE, search=True) == found
    assert all(torch.equal(before[name], value) for name, value in state.network.state_dict().items())
    state.micro_batch = found
    assert train.train_step(state, random_batch(10), settings, ALONE) is not None
    assert train.choose_micro_batch(state, settings, ALONE, search=False) == 10
    assert train.choose_micro_batch(state, config(batch_size=10, micro_batch=40), ALONE, search=True) == 10


def test_found_micro_batch_is_reused() -> None:
    settings = config(batch_size=10, micro_batch="auto")
    state = new_state(settings, ALONE)
    state.micro_batch = 4
    content = to_checkpoint(state, {"sample": 0}, settings, ALONE)
    for changes, expected in (
        ({}, 4),
        ({"batch_size": 3}, 3),
        ({"precision": "bf16"}, None),
        ({"micro_batch": "whole"}, None),
    ):
        other = new_state(config(**{"batch_size": 10, "micro_batch": "auto", **changes}), ALONE)
        from_checkpoint(content, other, config(**{"batch_size": 10, "micro_batch": "auto", **changes}), ALONE)
        assert other.micro_batch == expected, changes


def broken_network(state: State) -> None:
    """Make a network return NaN for bright input."""
    forward = state.network.forward
    state.network.forward = lambda lr: forward(lr) * torch.where(lr.mean() > 0.9, torch.nan, 1.0)  # type: ignore[method-assign]


def test_non_finite_steps_change_nothing() -> None:
    state = new_state(config(), ALONE)
    train.train_step(state, random_batch(2), config(), ALONE)
    broken_network(state)
    before = copy.deepcopy([state.network.state_dict(), state.ema.state_dict(), state.optimiser.state_dict()])
    bright = tuple(torch.full_like(side, 255) for side in random_batch(2))
    assert train.train_step(state, (bright[0], bright[1]), config(), ALONE) is None
    assert (state.iteration, state.skipped, state.skipped_in_row) == (2, 1, 1)
    after = [state.network.state_dict(), state.ema.state_dict(), state.optimiser.state_dict()]
    assert repr(before) == repr(after)
    assert train.train_step(state, random_batch(2), config(), ALONE) is not None
    assert (state.iteration, state.skipped, state.skipped_in_row) == (3, 1, 0)


def test_non_finite_steps_are_reported_and_too_many_end_the_run(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(train, "combined", lambda sr, *_: Losses(sr.mean() * torch.nan, {}))
    result = run("a", "--max-skipped", 2)
    assert result.exit_code == 1
    assert "iteration 1: non-finite loss or gradients for samples 0 to 1; step skipped (1 so far)" in result.stdout
    assert "iteration 3" in result.stderr
    assert "samples 4 to 5; 3 such steps in a row, expected at most 2" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_run_reports_logs_and_saves(
    run: Callable[..., Result], training_shards: Path, photographs: Path, tmp_path: Path
) -> None:
    result = run("a", "--valid-shards", str(training_shards), "--validate-every", 3, "--checkpoint-every", 4)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [match[1] for line in lines if (match := LINE.fullmatch(line))] == ["2", "3", "4", "6"]
    assert len([line for line in lines if line.startswith("validation at iteration")]) == 2

    log = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in log] == [2, 3, 3, 3, 4, 6, 6]
    assert all(0 <= entry["data_wait"] <= 1 and entry["peak_memory"] > 1e7 for entry in log if "loss" in entry)
    scores = {"psnr_rgb", "ssim_rgb", "psnr_y", "ssim_y"}
    assert set(log[2]) == {"iteration", "valid", *(f"bicubic_{key}" for key in scores)}
    assert set(log[-1]) == {"iteration", "valid", *scores}

    path = tmp_path / "a" / "checkpoints" / "last.pt"
    content = read(path)
    assert content["iteration"] == 6
    assert content["place"]["sample"] == 12
    assert content["config"]["fft_weight"] == 0.1
    names = ["best.pt", "iteration-00000003.pt", "iteration-00000004.pt", "iteration-00000006.pt", "last.pt"]
    assert {entry.name for entry in path.parent.iterdir()} <= set(names)
    best = max((entry for entry in log if "psnr_y" in entry), key=lambda entry: entry["psnr_y"])
    assert read(path.with_name("best.pt"))["iteration"] == best["iteration"]
    assert {entry.name for entry in path.parent.parent.iterdir()} - {"tensorboard"} == {
        *("checkpoints", "config.toml", "curves.png", "finished", "metrics.jsonl", "samples"),
    }
    for picture in ("curves.png", "samples/00000003.png", "samples/00000006.png"):
        assert np.asarray(PillowImage.open(tmp_path / "a" / picture)).std() > 5, picture
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


def test_seed_determines_the_run(run: Callable[..., Result], tmp_path: Path) -> None:
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(out, "--seed", seed, "--iterations", 2).exit_code == 0
    a, b, c = (load_checkpoint(tmp_path / out / "checkpoints" / "last.pt").weights for out in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["tail.weight"], c["tail.weight"])


def test_resume_auto_starts_a_new_run_without_a_checkpoint(run: Callable[..., Result], tmp_path: Path) -> None:
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
    assert "already holds a run; use --resume auto" in result.stderr
    assert (tmp_path / "a" / "checkpoints" / "last.pt").read_bytes() == before


def test_wrong_checkpoints_are_not_resumed(run: Callable[..., Result], tmp_path: Path) -> None:
    assert run("a", "--iterations", 1).exit_code == 0
    whole = tmp_path / "a" / "checkpoints" / "last.pt"
    torch.save({"params": ShuffleMixer.preset("tiny", 2).state_dict()}, tmp_path / "weights.pt")
    for flags, message in (
        (["--resume", tmp_path / "absent.pt"], "no such file"),
        (["--resume", tmp_path / "weights.pt"], "expected a train.py checkpoint with iteration, config"),
        (["--resume", whole, "--model", "base"], "network: features: 32 in the checkpoint, 64 requested"),
    ):
        result = run("b", *flags)
        assert result.exit_code == 1
        assert message in result.stderr
        assert "Traceback" not in result.output


def test_failed_save_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving.save(tmp_path / saving.checkpoint_name(1), {"params": {}}, keep=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        saving.save(tmp_path / saving.checkpoint_name(2), {"params": {}}, keep=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_config_toml_reproduces_a_run(run: Callable[..., Result], tmp_path: Path) -> None:
    assert run("a", "--iterations", 2, "--learning-rate", 1e-3).exit_code == 0
    result = run("b", "--config", tmp_path / "a" / "config.toml", "--iterations", 2)
    assert result.exit_code == 0, result.output
    a, b = (read(tmp_path / out / "checkpoints" / "last.pt") for out in "ab")
    assert b["config"] == a["config"]
    assert b["config"]["learning_rate"] == 1e-3
    assert all(torch.equal(a["params"][name], b["params"][name]) for name in a["params"])


def test_resumed_run_uses_the_learning_rate_flag(run: Callable[..., Result], tmp_path: Path) -> None:
    assert run("a", "--iterations", 3).exit_code == 0
    assert run("a", "--resume", "auto", "--learning-rate", 1e-3).exit_code == 0
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert rates == [5e-4, 5e-4, 1e-3, 1e-3]


def test_log_entries_after_the_last_checkpoint_are_rewritten(run: Callable[..., Result], tmp_path: Path) -> None:
    assert run("a", "--iterations", 4, "--checkpoint-every", 2).exit_code == 0
    for name in ("iteration-00000004.pt", "last.pt"):
        (tmp_path / "a" / "checkpoints" / name).unlink()
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "lo')
    result = run("a", "--resume", "auto")
    assert "2 iterations done" in result.stdout
    log = [json.loads(line)["iteration"] for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert log == [2, 4, 6]


def test_resume_takes_the_newest_undamaged_checkpoint(run: Callable[..., Result], tmp_path: Path) -> None:
    assert run("a", "--checkpoint-every", 2, "--keep", 2).exit_code == 0
    folder = tmp_path / "a" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        "iteration-00000004.pt",
        "iteration-00000006.pt",
        "last.pt",
    ]
    damaged = bytearray((folder / "iteration-00000006.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / "iteration-00000006.pt").write_bytes(damaged)
    result = run("a", "--resume", "auto", "--iterations", 8)
    assert result.exit_code == 0, result.output
    assert "iteration-00000006.pt: expected" in result.stdout
    assert "4 iterations done" in result.stdout
    for path in folder.iterdir():
        path.write_bytes(b"rubbish")
    result = run("a", "--resume", "auto")
    assert result.exit_code == 1
    assert "iteration-00000008.pt: expected" in result.stderr


def test_resuming_from_an_older_checkpoint_is_refused(run: Callable[..., Result], tmp_path: Path) -> None:
    assert run("a", "--checkpoint-every", 3).exit_code == 0
    older = tmp_path / "a" / "checkpoints" / "iteration-00000003.pt"
    result = run("a", "--resume", older)
    assert result.exit_code == 1
    assert "iteration-00000006.pt: is newer than" in result.stderr
    assert run("b", "--resume", older).exit_code == 0
    a, b = (read(tmp_path / out / "checkpoints" / "last.pt") for out in "ab")
    assert all(torch.equal(a["params"][name], b["params"][name]) for name in a["params"])


def test_resuming_into_another_folder(run: Callable[..., Result], training_shards: Path, tmp_path: Path) -> None:
    assert run("a", "--iterations", 3).exit_code == 0
    flags = ["--valid-shards", str(training_shards), "--validate-every", 3]
    result = run("b", "--resume", tmp_path / "a" / "checkpoints" / "last.pt", *flags)
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "b" / "checkpoints").iterdir()}
    assert {"iteration-00000003.pt", "iteration-00000006.pt", "last.pt", "best.pt"} <= names


def test_resuming_with_another_seed_is_refused(run: Callable[..., Result]) -> None:
    assert run("a", "--iterations", 2).exit_code == 0
    result = run("a", "--resume", "auto", "--seed", 1)
    assert result.exit_code == 1
    assert "--seed: 0 in the checkpoint, 1 requested" in result.stderr


def test_a_finished_run_can_be_resumed(run: Callable[..., Result], tmp_path: Path) -> None:
    assert run("a", "--iterations", 3).exit_code == 0
    assert (tmp_path / "a" / "finished").exists()
    result = run("a", "--iterations", 3, "--resume", "auto")
    assert result.exit_code == 0
    assert "finished: 3 iterations" in result.stdout


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signals_save_and_exit_with_code_0(
    name: str, run: Callable[..., Result], training_shards: Path, tmp_path: Path
) -> None:
    """A validation skipped because of a signal is done after resuming."""
    flags = ["--iterations", 1000, "--log-every", 1, "--valid-shards", str(training_shards), "--validate-every", 2]
    with start(command(training_shards, tmp_path / "a", *flags, "--batch-size", 2)) as process:
        assert process.stdout is not None
        lines = iter(process.stdout)
        next(line for line in lines if line.startswith("iteration 4/"))
        process.send_signal(getattr(signal, name))
        rest = list(lines)
    assert process.returncode == 0, rest
    assert rest[-1].startswith(f"stopped by {name} after iteration "), rest
    done = read(tmp_path / "a" / "checkpoints" / "last.pt")["iteration"]
    assert done >= 4
    assert not (tmp_path / "a" / "finished").exists()
    flags = ["--valid-shards", str(training_shards), "--validate-every", 2]
    assert run("a", "--resume", "auto", "--iterations", done + 1, *flags).exit_code == 0
    assert run("b", "--iterations", done + 1, *flags).exit_code == 0
    a, b = (read(tmp_path / out / "checkpoints" / "last.pt") for out in "ab")
    assert all(torch.equal(a[key][n], b[key][n]) for key in ("params", "params_ema") for n in a[key])
    logs = [list(read_log(tmp_path / out / "metrics.jsonl")) for out in "ab"]
    validated = [[entry["iteration"] for entry in log if "psnr_y" in entry] for log in logs]
    assert validated[0] == validated[1]


def test_small_images_are_reported_and_can_be_skipped(run: Callable[..., Result]) -> None:
    result = run("a", "--lr-patch", 20)
    assert result.exit_code == 1
    assert "small" in result.stderr
    assert "--skip-small" in result.stderr
    result = run("a", "--lr-patch", 20, "--skip-small", "--iterations", 1)
    assert result.exit_code == 0, result.output


def test_bad_input_is_a_one_line_error(run: Callable[..., Result], tmp_path: Path) -> None:
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


def test_a_damaged_shard_is_a_one_line_error(run: Callable[..., Result], training_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(training_shards, tmp_path / "copy")
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
        (["--micro-batch", "0"], "expected a number of at least 1, auto or whole, got '0'"),
        (["--kernel-size", "4"], "kernel_size must be odd"),
        (["--l1-weight", "-1"], "the weight of l1 must be finite and at least 0, got -1.0"),
        (["--warmup", "-1"], "--warmup must be at least 0"),
        (["--config", "absent.toml"], "absent.toml"),
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
    assert ADAM_BETAS == (0.9, 0.99)
