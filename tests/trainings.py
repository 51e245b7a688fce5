"""Runs of train.py as processes of their own, for the tests that kill them or start several together."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
SMALL = ["--scale", "2", "--lr-patch", "12", "--batch-size", "4", "--device", "cpu", "--workers", "1"]


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
    return said


def last(out: Path) -> dict[str, Any]:
    """A run's last checkpoint."""
    content: dict[str, Any] = torch.load(out / "checkpoints" / "last.pt", weights_only=True)
    return content
