"""Helpers that run train.py in this process, in child processes, or on several ranks."""

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
    """Start a run with one thread, so that concurrent runs do not compete for cores."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env)


def start_ranks(words: list[str], count: int) -> "list[subprocess.Popen[str]]":
    """Start a run on several ranks, like a cluster's scheduler."""
    return [start(words, **environment) for environment in rank_environments(count)]


def rank_environments(count: int) -> list[dict[str, str]]:
    """Return the environment variables of each rank on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in range(count)]


def finish(*processes: "subprocess.Popen[str]") -> list[str]:
    """Wait for processes and return their output; all must exit with code 0 and without warnings."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    return [without_warnings(text) for text in outputs]


def last(out: Path) -> dict[str, Any]:
    """Return the content of a run's last checkpoint."""
    content: dict[str, Any] = torch.load(out / "checkpoints" / "last.pt", weights_only=True)
    return content


def invoke(shards: Path | None, out: Path, *flags: object) -> Result:
    """Run train.py in this process, by default for 3 small iterations; later flags win."""
    words = [*SMALL[2:], "--batch-size", 2, "--iterations", 3, "--scale", 2, "--out", out, *flags]
    return CliRunner().invoke(train.main, [str(word) for word in (["--shards", shards] if shards else []) + words])


def resume(out: Path, *flags: object) -> Result:
    """Resume a run, given only its folder and these flags."""
    return CliRunner().invoke(train.main, [str(word) for word in ["--resume", "auto", "--out", out, *flags]])


def without_warnings(output: str) -> str:
    """Return the output of a child process after checking that it contains no warnings."""
    warnings = [line for line in output.splitlines() if "warning" in line.lower() or line.startswith("[W")]
    assert not warnings, output
    return output


# Forks ranks from a process that has imported torch. Reads jobs and writes exit codes and output, as JSON lines.
FORK_SERVER = """
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


class RankForker:
    """Forks ranks that run train.py or other code; close it after use."""

    def __init__(self) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-c", FORK_SERVER]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env, start_new_session=True
        )

    def run(self, words: list[str], code: str = "train.main()", count: int = 2) -> list[tuple[int, str]]:
        """Run `code`, which can read `rank`, on all ranks; return exit codes and output. Ranks that hang are killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([code, words, rank_environments(count)]) + "\n")
        self.process.stdin.flush()
        watchdog = threading.Timer(300, os.killpg, (self.process.pid, signal.SIGKILL))
        watchdog.start()
        try:
            ends = json.loads(self.process.stdout.readline())
        finally:
            watchdog.cancel()
        return [(end, without_warnings(text)) for end, text in ends]

    def close(self) -> None:
        """Stop the process."""
        self.process.communicate("", timeout=60)
