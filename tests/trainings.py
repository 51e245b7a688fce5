"""Runs of train.py as processes of their own, for the tests that kill them or start several together."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result

import train

ROOT = Path(__file__).parent.parent
SMALL = ["--scale", "2", "--lr-patch", "12", "--batch-size", "4", "--device", "cpu", "--workers", "1"]

# The layout that DDP wants of 1 × 1 convolutions is given to them in model/; this line goes with that.
EXPECTED = ("Grad strides do not match bucket view strides",)


def command(shards: Path, out: Path, *flags: object) -> list[str]:
    """The command line of a small run."""
    return [sys.executable, "train.py", "--shards", str(shards), "--out", str(out), *SMALL, *map(str, flags)]


def start(words: list[str], **environment: str) -> "subprocess.Popen[str]":
    """Start a run: one thread, so that many at once do not stand in each other's way."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env)


def start_ranks(words: list[str], count: int) -> "list[subprocess.Popen[str]]":
    """Start a run on several ranks, as a cluster's scheduler does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [start(words, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(count)]


def finish(*processes: "subprocess.Popen[str]") -> list[str]:
    """What processes said, once all have ended well."""
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return [calm(text) for text in said]


def last(out: Path) -> dict[str, Any]:
    """A run's last checkpoint."""
    content: dict[str, Any] = torch.load(out / "checkpoints" / "last.pt", weights_only=True)
    return content


def invoke(shards: Path | None, out: Path, *flags: object) -> Result:
    """Run train.py in this process, for 3 small iterations unless flags say otherwise; later flags win."""
    words = [*SMALL[2:], "--batch-size", 2, "--iterations", 3, "--scale", 2, "--out", out, *flags]
    return CliRunner().invoke(train.main, [str(word) for word in (["--shards", shards] if shards else []) + words])


def resume(out: Path, *flags: object) -> Result:
    """Go on with a run by nothing but its folder, and these flags."""
    return CliRunner().invoke(train.main, [str(word) for word in ["--resume", "auto", "--out", out, *flags]])


def calm(said: str) -> str:
    """What a child process said, without a warning of ours, of torch or of Python."""
    noise = [line for line in said.splitlines() if "warning" in line.lower() or line.startswith("[W")]
    noise = [line for line in noise if not any(one in line for one in EXPECTED)]
    assert not noise, said
    return said
