"""Builds killed at any moment: they leave no dataset, and the same command resumes them to the same bytes."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers import digests, photograph, write_image

from loader.errors import ShardsError
from loader.format.index import read_index

WORDS = ("--scale", "2", "--scale", "8", "--resize", "matlab-double", "--images-per-shard", "1", "--workers", "2")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that take a while to process."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(12):
        write_image(folder / f"{i:02}.png", photograph(500, 400, i))
    return folder


@pytest.fixture(scope="module", params=["hdf5", "raw"])
def container(request: pytest.FixtureRequest) -> str:
    """Each container."""
    return str(request.param)


@pytest.fixture(scope="module")
def undisturbed(images: Path, container: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float]:
    """The files of an undisturbed build, and its seconds per shard."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    start = time.monotonic()
    assert end(begin(images, out, container))[0] == 0
    return digests(out), (time.monotonic() - start) / 12


def begin(images: Path, out: Path, container: str, *words: str) -> subprocess.Popen[str]:
    """Start a build in its own process group."""
    command = [sys.executable, "-m", "prep.cli", "build-shards", str(images), *WORDS, "--format", container, *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [*command, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return exit code and stderr once all processes that share it have ended, workers included."""
    errors = process.communicate(timeout=120)[1]
    return process.returncode, errors


def shards(out: Path) -> int:
    """Return how many shards have a record."""
    return len(list(out.glob("shard-*.json")))


def kill_and_resume(
    images: Path, out: Path, container: str, undisturbed: tuple[dict[str, str], float], draw: random.Random, group: bool
) -> str:
    """Kill a build at a random moment, sometimes twice; check that the last run ends with the same bytes.

    The moment is a random time after a random number of records has appeared, or after the start, before any worker
    exists. Return the stage at which the first kill came.
    """
    expected, pause = undisturbed
    stage, killed = "", []
    for _ in range(1 if draw.random() < 0.7 else 2):
        process = begin(images, out, container)
        killed.append(process)
        moment = draw.randrange(-3, 13)
        while process.poll() is None and shards(out) < moment:
            time.sleep(0.002)
        time.sleep(draw.random() * (pause if moment >= 0 else 10 * pause))
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
        try:
            read_index(out)
            now = "complete"
        except ShardsError:
            now = f"{shards(out):2} of 12 shards" if (out / "build.json").exists() else "not begun"
        stage = stage or now
    # If only the parent was killed, its workers may still be ending: the next build waits for them.
    code, errors = end(begin(images, out, container))
    assert code == 0, errors
    assert re.fullmatch(r"(.*\d+ of 12 shards are already finished; all checksums match\n)?", errors), errors
    for process in killed:
        end(process)
    assert digests(out) == expected
    return stage


@pytest.mark.parametrize("group", [True, False])
def test_a_kill(
    images: Path, container: str, undisturbed: tuple[dict[str, str], float], tmp_path: Path, group: bool
) -> None:
    kill_and_resume(images, tmp_path / "out", container, undisturbed, random.Random(group), group)


def test_a_worker_is_killed(
    images: Path, container: str, undisturbed: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    """As the Linux kernel does when memory is short."""
    out = tmp_path / "out"
    process = begin(images, out, container)
    while process.poll() is None and not shards(out):
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    code, errors = end(process)
    assert code == 1
    assert "its worker process to succeed, got exit code -9; if memory was short, try fewer --workers" in errors
    assert "of 12 shards are finished; run the same command to resume" in errors
    assert errors.count("\n") == 2
    assert end(begin(images, out, container))[0] == 0
    assert digests(out) == undisturbed[0]


@pytest.mark.long
def test_many_kills(
    images: Path,
    container: str,
    undisturbed: tuple[dict[str, str], float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw = random.Random(5)
    stages: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for trial in range(30):
        group = trial % 2 == 0
        out = tmp_path / str(trial)
        stages[group][kill_and_resume(images, out, container, undisturbed, draw, group)] += 1
    unfinished = sum(count for seen in stages.values() for stage, count in seen.items() if "of 12" in stage)
    assert unfinished >= 10
    with capsys.disabled():
        for group, seen in stages.items():
            what = "the group" if group else "the parent alone"
            print(f"\n{container}: SIGKILL of {what}, {sum(seen.values())} builds, each resumed to the same bytes;")
            print("  at: " + ", ".join(f"{stage} ×{number}" for stage, number in sorted(seen.items())))
