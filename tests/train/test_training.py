"""Unit tests of the trainer's services: settings, schedule, search for a micro-batch, log."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from model.run_log import read_log
from model.training.memory import fits_in_memory, largest_micro_batch, peak_bytes
from model.training.ranks import Ranks, join_ranks
from model.training.reporter import Reporter, duration
from model.training.settings import Config, learning_rate
from model.training.settings_io import given_settings, resolve, setting_options, to_toml
from model.training.stopping import StopRequest

ALONE = Ranks(0, 1, torch.device("cpu"))


def config(**changes: Any) -> Config:
    settings: dict[str, Any] = {"shards": "s", "scale": 2, "out": "o"}
    return Config(**settings | changes)


@click.command()
@setting_options
def show(**values: Any) -> None:
    """Print the resolved settings."""
    click.echo(to_toml(resolve(given_settings(click.get_current_context(), values), {}, {})))


def shown(*flags: str) -> Any:
    return CliRunner().invoke(show, [*flags])


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(
        'shards = "x \\" é"\nscale = 2\nout = "o"\nlearning_rate = 1\nnorm = false\nmicro_batch = 4\nseed = 7\n'
    )
    result = shown("--config", str(file), "--seed", "8", "--no-shuffle")
    assert result.exit_code == 0, result.output
    again = tmp_path / "b.toml"
    again.write_text(result.stdout)
    assert shown("--config", str(again)).stdout == result.stdout
    expected = config(shards='x " é', learning_rate=1.0, norm=False, shuffle=False, micro_batch=4, seed=8)
    assert result.stdout == to_toml(expected) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iteration = 5", "iteration: expected one of shards, scale"),
        ("iterations = 5.5", "iterations: expected a whole number, got 5.5"),
        ("iterations = true", "iterations: expected a whole number, got True"),
        ('iterations = "many"', "iterations: expected a whole number, got 'many'"),
        ('learning_rate = "much"', "learning_rate: expected a number, got 'much'"),
        ("shuffle = 1", "shuffle: expected true or false, got 1"),
        ("model = 3", "model: expected a string, got 3"),
        ("[train]\nseed = 1", "train: expected one of"),
        ("seed = ", "a.toml: "),
        ("seed = 1\nseed = 2", "a.toml: "),
        ("seed = -1", "--seed must be at least 0"),
    ],
)
def test_invalid_settings_files(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(text)
    result = shown("--config", str(file), "--shards", "s", "--scale", "2", "--out", "o")
    assert result.exit_code != 0
    assert message in (result.stderr or str(result.exception))


def test_learning_rates() -> None:
    constant = config(warmup=4, learning_rate=1.0, iterations=14)
    assert [learning_rate(i, constant) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = config(warmup=4, learning_rate=1.0, iterations=14, schedule="cosine")
    expected = [0.25, 0.5, 0.75, 1.0, *((1 + math.cos(math.pi * i / 10)) / 2 for i in range(11)), 0.0]
    assert [learning_rate(i, cosine) for i in range(16)] == pytest.approx(expected)
    assert learning_rate(0, config()) == 5e-4


@pytest.mark.parametrize("samples", [1, 2, 7, 16, 64, 65])
def test_largest_micro_batch_is_found(samples: int) -> None:
    for limit in range(1, samples + 2):
        tries: list[int] = []

        def fits(size: int, limit: int = limit, tries: list[int] = tries) -> bool:
            tries.append(size)
            return size <= limit

        found = largest_micro_batch(samples, fits)
        parts = next(n for n in range(1, samples + 1) if -(-samples // n) <= limit)
        assert found == -(-samples // parts)
        assert len(tries) <= 2 * math.log2(samples) + 2
    with pytest.raises(MemoryError, match="out of memory for a single sample"):
        largest_micro_batch(samples, lambda _: False)


def test_out_of_memory_means_a_size_does_not_fit() -> None:
    def step(samples: int) -> None:
        if samples > 5:
            raise torch.OutOfMemoryError("a limit made for this test")

    assert largest_micro_batch(16, fits_in_memory(step, torch.device("cpu"))) == 4
    assert largest_micro_batch(5, fits_in_memory(step, torch.device("cpu"))) == 5

    def fail(samples: int) -> None:
        raise RuntimeError("another error")

    with pytest.raises(RuntimeError, match="another error"):
        fits_in_memory(fail, torch.device("cpu"))(1)


def test_peak_memory_equals_the_systems_count() -> None:
    held = torch.ones(2**28, dtype=torch.uint8)
    counted = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert counted
    assert peak_bytes(torch.device("cpu")) == pytest.approx(int(counted[1]) * 1024, rel=0.02)
    assert peak_bytes(torch.device("cpu")) > held.numel()


def test_a_truncated_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    assert list(read_log(log)) == []
    log.write_text('{"iteration": 1, "loss": 2.5}\n[1]\n{"iter": 1}\n{"iteration": 2, "lo')
    assert list(read_log(log)) == [{"iteration": 1, "loss": 2.5}]


def test_records_go_to_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporter = Reporter(config(out=str(tmp_path)), ALONE, 0, StopRequest())
    reporter.record(3, {"loss": 0.5})
    reporter.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [(3, 0.5)]
    assert list(read_log(tmp_path / "metrics.jsonl")) == [{"iteration": 3, "loss": 0.5}]


def test_reporter_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    reporter = Reporter(config(out=str(tmp_path)), ALONE, 0, StopRequest())
    reporter.record(3, {"loss": 0.5})
    reporter.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.6, 3599, 90061)] == ["0:00:00", "0:01:00", "0:59:59", "25:01:01"]


def test_ranks_of_a_single_process() -> None:
    with join_ranks("cpu") as ranks:
        assert ranks.any_of(True, False) == (True, False)
        assert ranks.minimum(3) == 3
        values = torch.ones(2)
        assert torch.equal(ranks.sum(values), values)
        assert ranks.first
