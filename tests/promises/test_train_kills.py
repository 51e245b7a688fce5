"""Training runs that are killed at random moments and resumed end with the same weights."""

import random
import subprocess
import time
from pathlib import Path

import pytest
import torch
from trainings import command, finish, last, start


def survive(shards: Path, folder: Path, kills: int, iterations: int, seed: int) -> tuple[int, int]:
    """Kill and resume a run, compare it to an uninterrupted one, and return the numbers of kills and resumes."""
    flags = ["--iterations", iterations, "--checkpoint-every", 5, "--log-every", 10]
    flags += ["--valid-shards", str(shards), "--validate-every", 20]
    began = time.monotonic()
    process = start(command(shards, folder / "whole", *flags))
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("iteration "))
    starting = time.monotonic() - began
    finish(process)
    running = time.monotonic() - began - starting
    chance, killed, resumed = random.Random(seed), 0, 0
    words = [*command(shards, folder / "killed", *flags), "--resume", "auto"]
    while killed < kills:
        process = start(words)
        # At any moment: while it starts, trains, saves or validates; but spread so that all kills come before the end.
        early = chance.random() < 0.3
        moment = chance.uniform(0, starting) if early else starting + chance.uniform(0, 1.5 * running / kills)
        try:
            output = process.communicate(timeout=moment)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
            resumed += "resuming from" in process.communicate()[0]
        else:
            assert process.returncode == 0, output
            break
    finish(start(words))
    one, other = last(folder / "whole"), last(folder / "killed")
    assert one["iteration"] == other["iteration"] == iterations
    for key in ("params", "params_ema"):
        for name, value in one[key].items():
            assert torch.equal(value, other[key][name]), f"{key} {name}"
    logs = [(folder / out / "metrics.jsonl").read_text().count('"psnr_y"') for out in ("whole", "killed")]
    assert logs[0] == logs[1]
    assert not list((folder / "killed" / "checkpoints").glob(".*"))
    return killed, resumed


def test_a_killed_run_ends_bit_equal(training_shards: Path, tmp_path: Path) -> None:
    killed, _ = survive(training_shards, tmp_path, kills=2, iterations=60, seed=1)
    assert killed > 0


@pytest.mark.long
def test_ten_kills(training_shards: Path, tmp_path: Path) -> None:
    killed, resumed = survive(training_shards, tmp_path, kills=10, iterations=1500, seed=2)
    print(f"\n{killed} kills by SIGKILL, {resumed} of them of resumed runs; parameters bit-equal after 1500 iterations")
    assert killed == 10
    assert resumed > 3
