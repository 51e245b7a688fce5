"""Checkpoints: layouts, inferred and stored configurations, and clear errors for anything else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoints import CheckpointError, find_config, infer_config, load_checkpoint
from model.shufflemixer import ShuffleMixer, ShuffleMixerConfig

NETWORKS = [(name, scale) for name in ("tiny", "base") for scale in (2, 3, 4)]


@pytest.mark.parametrize(
    "config",
    [
        *(ShuffleMixerConfig.preset(name, scale) for name, scale in NETWORKS),
        ShuffleMixerConfig(features=16, kernel_size=5, blocks=2, mlp_ratio=3, scale=3),
        ShuffleMixerConfig.preset("tiny", 2, split=False),
        ShuffleMixerConfig.preset("tiny", 3, fused=False),
        ShuffleMixerConfig.preset("base", 4, norm=False),
        ShuffleMixerConfig(features=8, kernel_size=3, mlp_ratio=3, split=False, fused=False, norm=False),
    ],
)
def test_config_is_inferred_from_weights(config: ShuffleMixerConfig) -> None:
    assert infer_config(ShuffleMixer.from_config(config).state_dict()) == config


def small_network() -> ShuffleMixer:
    return ShuffleMixer(features=8, kernel_size=3, blocks=1, mlp_ratio=2, scale=2)


def test_checkpoint_layouts(tmp_path: Path) -> None:
    raw, ema = small_network().state_dict(), small_network().state_dict()
    wrapped = {f"module.{name}": value for name, value in raw.items()}
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"params": raw, "params_ema": ema, "iteration": 5}, "params_ema", "params"),
        ({"params_ema": ema}, "params_ema", "params_ema"),
        ({"params": wrapped}, "params", "params"),
        (dict(raw), "bare", "bare"),
    ]
    for content, by_ema, by_raw in cases:
        path = tmp_path / "weights.pt"
        torch.save(content, path)
        assert load_checkpoint(path).weights_key == by_ema
        assert load_checkpoint(path, prefer="raw").weights_key == by_raw
        weights = load_checkpoint(path).build().state_dict()
        expected = ema if by_ema == "params_ema" else raw
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


class Harmful:
    """An object whose unpickling calls a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (Path("srshards-pickle-was-executed"),)


def test_wrong_files_are_clear_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = small_network().state_dict()
    missing = {name: value for name, value in good.items() if name != "tail.bias"}
    torch.save(good, "whole.pt")
    Path("truncated.pt").write_bytes(Path("whole.pt").read_bytes()[:2000])
    Path("text.pt").write_text("not a checkpoint")
    torch.save({"params": Harmful()}, "harmful.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"params": 3}, "number.pt")
    torch.save({"conv.weight": torch.zeros(1)}, "other.pt")
    torch.save({"params": missing}, "missing.pt")
    torch.save(good | {"extra": torch.zeros(1)}, "extra.pt")
    cases = {
        "absent.pt": "no such file",
        "truncated.pt": "got a damaged file or other content",
        "text.pt": "got a damaged file or other content",
        "harmful.pt": "got a damaged file or other content",
        "list.pt": "expected a mapping of weights, got list",
        "number.pt": "expected weights in params_ema, params or at the top, got keys params",
        "other.pt": "not the weights of a ShuffleMixer; missing or wrong: 'to_feat.weight'",
        "missing.pt": r"tail.bias: expected \(3,\), got nothing",
        "extra.pt": r"extra: expected no such name, got \(1,\)",
    }
    for name, message in cases.items():
        with pytest.raises(CheckpointError, match=f"^{name}.*{message}"):
            load_checkpoint(Path(name)).build()
    assert not Path("srshards-pickle-was-executed").exists()


SMALL = {"features": 8, "kernel_size": 3, "blocks": 1}


def test_stored_network_config_is_used(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    for changes in ({}, {"shuffle": False}, {"split": False}, {"norm": False, "fused": False}):
        network = ShuffleMixer(**SMALL, scale=3, **changes)  # type: ignore[arg-type]
        torch.save({"params": network.state_dict(), "network": dataclasses.asdict(network.config)}, path)
        checkpoint = load_checkpoint(path)
        assert checkpoint.config == network.config
        lr = torch.rand(1, 3, 5, 6)
        assert torch.equal(checkpoint.build()(lr), network(lr))


def test_missing_fields_default_to_the_published_network(tmp_path: Path) -> None:
    weights = ShuffleMixer(8, 3).state_dict()
    config = find_config(tmp_path, {"network": {"features": 8, "kernel_size": 3}}, weights)
    assert config == ShuffleMixerConfig(8, 3)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (3, "expected a mapping, got int"),
        ({"kernel_size": 3}, "expected a field 'features', got none"),
        (SMALL | {"colour": 1}, "expected fields features, .*, norm, got 'colour'"),
        (SMALL | {"shuffle": 1}, "shuffle must be true or false, got 1"),
        (SMALL | {"features": "8"}, "features must be a whole number of at least 1, got '8'"),
        (SMALL | {"scale": 2, "norm": False}, "the weights have norm True, got False"),
        (SMALL | {"scale": 2, "split": False}, "the weights have split True, got False"),
        (SMALL | {"scale": 4}, "the weights have scale 2, got 4"),
    ],
)
def test_wrong_network_config_is_a_clear_error(network: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"params": small_network().state_dict(), "network": network}, path)
    with pytest.raises(CheckpointError, match=f"^{path}: network: {message}"):
        load_checkpoint(path)
