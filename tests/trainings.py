"""Runs of train.py as processes of their own, for the tests that kill them or start several together."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result
from helpers import ROOT

import train

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
    return [start(words, **place) for place in places(count)]


def places(count: int) -> list[dict[str, str]]:
    """The environments of so many ranks on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in range(count)]


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
    assert not noise, said
    return said


# Forks ranks, so that each test need not import torch anew: reads what to do and says how that ended, as JSON.
NURSERY = """
import json, os, sys, tempfile, traceback
import train
def live(code, words, environment, output):
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    os.environ.update(environment)
    sys.argv = ["train.py", *words]
    end = 0
    try:
        exec(code, {"__name__": "__main__", "train": train, "rank": int(environment["RANK"])})
    except SystemExit as error:
        end = error.code or 0
    except BaseException:
        traceback.print_exc()
        end = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end)
for line in sys.stdin:
    code, words, environments = json.loads(line)
    ranks = []
    for environment in environments:
        output = tempfile.TemporaryFile("w+")
        child = os.fork()
        if not child:
            live(code, words, environment, output)
        ranks.append((child, output))
    ends = []
    for child, output in ranks:
        end = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        ends.append((end, output.read()))
    print(json.dumps(ends), flush=True)
"""


class Nursery:
    """Runs ranks of train.py, or of other code, together; it is to be closed."""

    def __init__(self) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-c", NURSERY]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env, start_new_session=True
        )

    def run(self, words: list[str], code: str = "train.main()", count: int = 2) -> list[tuple[int, str]]:
        """How each rank ended, and what it said; `code` knows its `rank`. Ranks that hang are killed, and an error."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([code, words, places(count)]) + "\n")
        self.process.stdin.flush()
        watchdog = threading.Timer(300, os.killpg, (self.process.pid, signal.SIGKILL))
        watchdog.start()
        try:
            ends = json.loads(self.process.stdout.readline())
        finally:
            watchdog.cancel()
        return [(end, calm(text)) for end, text in ends]

    def close(self) -> None:
        """End the process."""
        self.process.communicate("", timeout=60)
