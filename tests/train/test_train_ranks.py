"""Several ranks train like one: the same samples, losses and network, also after resuming on another number."""

import re
import signal
from pathlib import Path

import pytest
import torch
from trainings import command, finish, last, start, start_ranks

from model.run_log import read_log

KEYS = ("params", "params_ema")


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(out / "metrics.jsonl") if "loss" in entry]


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    a, b = last(one), last(other)
    assert (a["iteration"], a["place"]) == (b["iteration"], b["place"])
    for key in KEYS:
        for name in a[key]:
            torch.testing.assert_close(a[key][name], b[key][name], rtol=0, atol=tolerance, msg=f"{key} {name}")


@pytest.fixture(scope="module")
def alone(training_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 iterations on one rank."""
    out = tmp_path_factory.mktemp("alone") / "a"
    flags = ["--iterations", 8, "--log-every", 1, "--valid-shards", str(training_shards), "--validate-every", 4]
    finish(start(command(training_shards, out, *flags)))
    return out


def test_two_ranks_train_like_one(alone: Path, training_shards: Path, tmp_path: Path) -> None:
    flags = ["--iterations", 8, "--log-every", 1, "--valid-shards", str(training_shards), "--validate-every", 4]
    words = command(training_shards, tmp_path / "two", *flags, "--micro-batch", 1)
    torchrun = [words[0], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = finish(start([*torchrun, *words[1:]]))[0]
    assert "(ranks: 2, micro-batches: 2, samples per micro-batch: 1)" in output
    assert output.count("\niteration 1/8") == 1  # only rank 0 reports
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), rel=1e-5)
    assert_close(alone, tmp_path / "two", 2e-4)  # Adam's first steps are equally long for tiny gradients
    scores = [
        [entry for entry in read_log(out / "metrics.jsonl") if "psnr_y" in entry] for out in (alone, tmp_path / "two")
    ]
    assert [entry["iteration"] for entry in scores[1]] == [4, 8]
    for one, other in zip(*scores, strict=True):
        assert other.pop("valid") == one.pop("valid")
        assert other == pytest.approx(one, rel=1e-3)


def test_resuming_on_one_rank_and_on_two_again(alone: Path, training_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    words = command(training_shards, out, "--iterations", 8, "--log-every", 1, "--resume", "auto")
    for ranks, until in ((2, 3), (1, 6), (2, 8)):
        output = finish(*start_ranks([*words, "--iterations", str(until)], ranks))
        assert f"(ranks: {ranks}, " in output[0]
    assert losses(out) == pytest.approx(losses(alone), rel=1e-5)
    assert_close(alone, out, 2e-4)


def test_a_signal_to_one_rank_stops_all(training_shards: Path, tmp_path: Path) -> None:
    words = command(training_shards, tmp_path / "a", "--iterations", 100000, "--log-every", 1)
    first, second = start_ranks(words, 2)
    assert first.stdout is not None
    next(line for line in first.stdout if line.startswith("iteration 2/"))
    second.send_signal(signal.SIGUSR1)
    output = finish(first, second)
    assert "stopped by a signal to another rank after iteration" in output[0]
    assert last(tmp_path / "a")["iteration"] >= 2


def test_unreachable_ranks_are_a_one_line_error(training_shards: Path, tmp_path: Path) -> None:
    process = start(command(training_shards, tmp_path / "a"), WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert re.fullmatch(r"Error: cannot connect to the other ranks \(world size 2\): .*MASTER_ADDR.*\n", output), output


def test_a_batch_size_that_ranks_cannot_split_is_refused(training_shards: Path, tmp_path: Path) -> None:
    words = command(training_shards, tmp_path / "a", "--batch-size", 3)
    processes = start_ranks(words, 2)
    output = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "--batch-size must be a multiple of the 2 ranks, got 3" in output[0]
    assert "--batch-size" not in output[1]  # one error only
    assert not (tmp_path / "a").exists()
