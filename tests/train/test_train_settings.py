"""Settings of new and resumed runs: where they come from, what may change, and what is reported."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from helpers import build, photograph, write_image
from hypothesis import given, settings
from hypothesis import strategies as st
from trainings import invoke, last, resume

import train
from model.checkpoints import CheckpointError
from model.training.resume import continue_stream
from model.training.settings import Config
from model.training.settings_io import read_settings, to_toml

pytestmark = pytest.mark.usefixtures("one_thread")

CUSTOM = [
    *("--learning-rate", 1e-3, "--schedule", "cosine", "--warmup", 2, "--ema-decay", 0.5, "--fft-weight", 0.2),
    *("--max-skipped", 7),
]


@pytest.fixture(scope="module")
def begun(training_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 iterations with many non-default settings."""
    out = tmp_path_factory.mktemp("begun") / "a"
    result = invoke(training_shards, out, *CUSTOM)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    """A copy of that run to resume."""
    return Path(shutil.copytree(begun, tmp_path / "a"))


def rewrite(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a run's last checkpoint."""
    content = last(out)
    change(content)
    for path in (out / "checkpoints").glob("*.pt"):
        torch.save(content, path)


def failed(result: Result, *texts: str) -> None:
    assert result.exit_code == 1, result.output
    assert len(result.stderr.splitlines()) == 1, result.output
    for text in texts:
        assert text in result.stderr


def test_a_folder_is_enough_to_resume(run: Path, begun: Path) -> None:
    before = tomllib.loads((run / "config.toml").read_text())
    result = resume(run, "--iterations", 4)
    assert result.exit_code == 0, result.output
    assert "--iterations: 3 → 4" in result.stdout
    assert result.stdout.count(" → ") == 1
    assert tomllib.loads((run / "config.toml").read_text()) == before | {"iterations": 4, "out": str(run)}
    assert last(run)["config"] == last(begun)["config"] | {"iterations": 4}
    assert last(run)["place"]["sample"] == 8  # the batch size too


def test_checkpoints_contain_no_paths_or_host_names(run: Path, training_shards: Path) -> None:
    settings = last(run)["config"]
    assert not settings.keys() & {"shards", "valid_shards", "out", "device"}
    assert os.uname().nodename not in repr({k: v for k, v in last(run).items() if k != "params"})
    assert str(training_shards) not in repr(settings)


def test_flags_win_over_the_file_and_the_file_over_the_checkpoint(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "b.toml"
    file.write_text("learning_rate = 2e-3\nema_decay = 0.25\n")
    result = resume(run, "--config", file, "--learning-rate", 3e-3, "--iterations", 4)
    assert result.exit_code == 0, result.output
    changed = {line.partition(":")[0]: line.partition(": ")[2] for line in result.stdout.splitlines() if " → " in line}
    assert changed == {"--learning-rate": "0.001 → 0.003", "--ema-decay": "0.5 → 0.25", "--iterations": "3 → 4"}
    settings = last(run)["config"]
    assert (settings["learning_rate"], settings["ema_decay"], settings["fft_weight"]) == (3e-3, 0.25, 0.2)


def test_settings_can_be_unset(run: Path, training_shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "b.toml"
    file.write_text(f'valid_shards = "{training_shards}"\nkernel_size = 3\nwarmup = 7\n')
    result = resume(
        *(run, "--config", file, "--unset", "valid-shards", "--unset", "kernel-size", "--unset", "warmup"),
        *("--unset", "schedule", "--iterations", 4),
    )
    assert result.exit_code == 0, result.output
    assert "validation" not in result.stdout
    settings = last(run)["config"]
    assert (settings["kernel_size"], settings["warmup"], settings["schedule"]) == (None, 0, "constant")
    assert "valid_shards" not in tomllib.loads((run / "config.toml").read_text())
    result = resume(run, "--unset", "warmup", "--warmup", 2)
    assert result.exit_code == 2
    assert "--warmup and --unset warmup: expected only one of them" in result.stderr


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--seed", 1], "--seed: 0 in the checkpoint, 1 requested"),
        (["--scale", 4], "network: scale: 2 in the checkpoint, 4 requested"),
        (["--lr-patch", 8], "--lr-patch: 12 in the checkpoint, 8 requested"),
        (["--kernel-size", 5], "network: kernel_size: 3 in the checkpoint, 5 requested"),
        (["--no-norm"], "network: norm: True in the checkpoint, False requested"),
        (["--iterations", 2], "3 iterations are done, --iterations 2 requested"),
    ],
)
def test_incompatible_changes_are_refused(
    run: Path, training_shards: Path, photographs: Path, tmp_path: Path, flags: list[object], text: str
) -> None:
    if "--scale" in flags:
        flags = [*flags, "--shards", build(photographs, tmp_path / "both", scales=(2, 4)), "--skip-small"]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    failed(resume(run, *flags), text)
    failed(resume(run, *flags, "--allow-other-dataset"), text)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_new_precision_starts_with_a_new_scaler(run: Path) -> None:
    assert last(run)["scaler"] == {}
    for number, precision in enumerate(("fp16", "bf16", "fp16"), start=4):
        result = resume(run, "--precision", precision, "--iterations", number)
        assert result.exit_code == 0, result.output
        assert f"→ {precision}" in result.stdout
        assert bool(last(run)["scaler"]) == (precision == "fp16")


def test_only_moments_are_restored_into_the_optimiser(run: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["optimiser"]["param_groups"][0] |= {"lr": 7.0, "fused": False, "initial_lr": 9.0}

    rewrite(run, change)
    assert resume(run, "--iterations", 4).exit_code == 0
    (group,) = last(run)["optimiser"]["param_groups"]
    assert (group["lr"] < 1e-2, group["fused"], "initial_lr" in group) == (True, True, False)


def test_an_explicit_default_is_no_change(run: Path) -> None:
    assert resume(run, "--kernel-size", 3).exit_code == 0  # tiny's own


def test_another_dataset_of_equal_length_is_refused(
    run: Path, training_shards: Path, photographs: Path, tmp_path: Path
) -> None:
    copy = build(photographs, tmp_path / "copy", scales=(2,), container="raw", images_per_shard=1)
    result = resume(run, "--shards", copy, "--iterations", 4)
    assert result.exit_code == 0, result.output
    others = shutil.copytree(photographs, tmp_path / "others")
    write_image(others / "one.png", photograph(64, 80))
    other = build(others, tmp_path / "other", scales=(2,))
    failed(
        resume(run, "--shards", other), "different dataset: trained on ", "use --allow-other-dataset to resume anyway"
    )
    result = resume(run, "--shards", other, "--iterations", 5, "--allow-other-dataset")
    assert result.exit_code == 0, result.output
    assert "dataset: " in result.stdout
    assert last(run)["place"]["sample"] == 10
    failed(resume(run, "--shards", copy), "different dataset")


def test_stream_positions_are_compared() -> None:
    stream = {"scale": 2, "lr_patch": 8, "augment": True, "seed": 0, "length": 9, "datasets": ["ab" * 32], "sample": 0}
    assert continue_stream({**stream, "sample": 5}, stream, False) == ({**stream, "sample": 5}, [])
    position, notes = continue_stream({"sample": 5, "seed": 0, "length": 9}, stream, False)  # of an earlier version
    assert position == {**stream, "sample": 5}
    assert "does not record its dataset" in notes[0]
    for key, other in (("scale", 3), ("lr_patch", 9), ("augment", False), ("seed", 1)):
        with pytest.raises(CheckpointError, match=f"{key}: {other} in the checkpoint, {stream[key]} requested"):
            continue_stream({**stream, key: other}, stream, True)
    for key, value in (("length", 8), ("datasets", ["cd" * 32]), ("datasets", "ab" * 32), ("datasets", None)):
        with pytest.raises(CheckpointError, match="different dataset"):
            continue_stream({**stream, key: value}, stream, False)
        assert len(continue_stream({**stream, key: value}, stream, True)[1]) == 1
    for sample in (-1, 1 << 62, 1.0, True, None, "x\x1b[2J"):
        with pytest.raises(CheckpointError, match="place: sample: expected a whole number") as caught:
            continue_stream({**stream, "sample": sample}, stream, False)
        assert str(caught.value).isprintable()


def test_checkpoints_of_earlier_versions_can_be_resumed(run: Path) -> None:
    def old(content: dict[str, Any]) -> None:
        content["config"] |= {"shards": "/nowhere", "out": "/nowhere", "valid_shards": None, "device": "cuda:7"}
        content["place"] = {key: content["place"][key] for key in ("sample", "seed", "length")}

    rewrite(run, old)
    result = resume(run, "--iterations", 4)
    assert result.exit_code == 0, result.output
    assert "does not record its dataset" in result.stdout


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dropout": 0.5}, "config: dropout: expected one of shards"),
        ({"x\x1b[2Jy": 0}, r"config: x\x1b[2Jy: expected one of shards"),
        ({"seed": 1.5}, "config: seed: expected a whole number, got 1.5"),
        ({"warmup": "x"}, "config: warmup: expected a whole number, got 'x'"),
        ({"l1_weight": [[]]}, "config: l1_weight: expected a number, got [[]]"),
    ],
)
def test_settings_in_a_checkpoint_are_checked(run: Path, changes: dict[str, Any], text: str) -> None:
    """The checkpoint may be of another version, or from a stranger."""
    rewrite(run, lambda content: content["config"].update(changes))
    failed(resume(run), text)


def test_bounds_apply_to_settings_in_a_checkpoint(run: Path) -> None:
    rewrite(run, lambda content: content["config"].update(batch_size=-4))
    result = resume(run)
    assert result.exit_code == 2
    assert "--batch-size must be at least 1" in result.stderr


def test_a_run_killed_before_its_first_checkpoint_keeps_its_settings(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    result = resume(run, "--warmup", 1)
    assert result.exit_code == 0, result.output
    assert "no checkpoint in " in result.stdout
    assert "--warmup: 2 → 1" in result.stdout
    assert last(run)["config"]["learning_rate"] == 1e-3


def test_resuming_an_empty_folder_is_a_one_line_error(tmp_path: Path) -> None:
    result = resume(tmp_path / "a")
    assert result.exit_code == 2
    assert "Missing option '--s" in result.stderr
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.toml").write_text("seed = ")
    failed(resume(tmp_path / "a"), "config.toml: ")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["config.toml"]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--out", ""], "--out must be a path, got ''"),
        (["--shards", ""], "--shards must be a path, got an empty one"),
        (["--valid-shards", ""], "--valid-shards must be a path, got an empty one"),
        (["--resume", ""], "--resume must be a path, got ''"),
        (["--device", "meta"], "cannot use 'meta'"),
        (["--device", ""], "cannot use ''"),
        (["--schedule", "cosine", "--unset", "schedule"], "--schedule and --unset schedule: expected only one of them"),
        (["--unset", "scale"], "'scale' is not one of"),
    ],
)
def test_usage(flags: list[str], text: str, training_shards: Path, tmp_path: Path) -> None:
    result = invoke(training_shards, tmp_path / "a", *flags)
    assert result.exit_code == 2, result.output
    assert text in result.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("flags", [[], ["--out", "x"], ["--shards", "x", "--out", "x"]])
def test_missing_options_are_named(flags: list[str]) -> None:
    result = CliRunner().invoke(train.main, flags)
    assert result.exit_code == 2
    assert "Missing option '--" in result.stderr


PATHS = st.binary(min_size=1, max_size=12).filter(lambda name: b"\0" not in name).map(os.fsdecode)
FLOATS = st.floats(0, 1e9, allow_nan=False)


@settings(max_examples=150, deadline=None)
@given(
    shards=PATHS,
    valid=st.none() | PATHS | st.text(min_size=1).filter(lambda t: t.isprintable() and "\0" not in t),
    rate=FLOATS,
    weight=FLOATS.filter(bool),
    minutes=FLOATS,
    micro=st.sampled_from(["auto", "whole"]) | st.integers(1, 2**70),
    seed=st.integers(0, 2**63 - 1),
    norm=st.booleans(),
)
def test_config_toml_round_trip(
    tmp_path_factory: pytest.TempPathFactory, shards: str, valid: str | None, rate: float, weight: float,
    minutes: float, micro: Any, seed: int, norm: bool,
) -> None:  # fmt: skip
    micro = min(micro, 2**31) if isinstance(micro, int) else micro
    config = Config(
        *(shards, 2, "\U0001f600 o\x7f\x1b\"\\'\n\u2028"),
        valid_shards=valid, learning_rate=rate, l1_weight=weight, checkpoint_minutes=minutes, micro_batch=micro,
        seed=seed, norm=norm,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    path.write_bytes(to_toml(config).encode())
    assert Config(**read_settings(path)) == config


def test_infinity_is_valid_toml(tmp_path: Path) -> None:
    config = Config("s", 2, "o")
    object.__setattr__(config, "checkpoint_minutes", float("inf"))
    assert tomllib.loads(to_toml(config))["checkpoint_minutes"] == float("inf")


@pytest.mark.parametrize(
    "text",
    ["seed = " + "9" * 5000, "seed = 1" + "0" * 400, "a = " + "[" * 50_000, "learning_rate = 1" + "0" * 400, "\udc80",
     'shards = { hex = "zz" }', 'shards = { hex = 5 }', 'seed = { hex = "00" }'],
)  # fmt: skip
def test_hostile_settings_files_are_a_one_line_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    result = CliRunner().invoke(train.main, ["--config", str(path)])
    assert result.exit_code == 2
    assert "a.toml: " in result.stderr
    assert "Traceback" not in result.output


def test_a_pipe_is_refused_as_a_settings_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    result = CliRunner().invoke(train.main, ["--config", str(tmp_path / "pipe")])
    assert result.exit_code == 2
    assert "a pipe, not a regular file" in result.stderr


def test_scores_are_kept_per_dataset(run: Path, training_shards: Path, photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    shutil.copy(photographs / "two.png", tmp_path / "some")
    other = build(tmp_path / "some", tmp_path / "other", scales=(2,))
    result = resume(run, "--valid-shards", training_shards, "--validate-every", 1, "--iterations", 4)
    assert result.exit_code == 0, result.output
    with (run / "metrics.jsonl").open("a") as file:  # a score that later ones on this dataset cannot reach
        valid = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["valid"]
        file.write(json.dumps({"iteration": 4, "psnr_y": 99.0, "valid": valid}) + "\n")
    assert resume(run, "--iterations", 5).exit_code == 0
    best = run / "checkpoints" / "best.pt"
    assert torch.load(best, weights_only=True)["iteration"] < 5
    result = resume(run, "--iterations", 6, "--valid-shards", other)
    assert result.exit_code == 0, result.output
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len([entry for entry in log if "bicubic_psnr_y" in entry]) == 2
    assert len({entry["valid"] for entry in log if "psnr_y" in entry}) == 2
    assert torch.load(best, weights_only=True)["iteration"] in (5, 6)  # 5 is validated again on the other dataset
