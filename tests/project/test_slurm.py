"""The batch scripts, run with stubs for Slurm's commands and train.py, and once with the real train.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, photograph, write_image

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
TRAIN, BUILD = (ROOT / "slurm" / name for name in ("train.sbatch", "build-shards.sbatch"))

# Runs tasks like srun: sets their environment, forwards signals, kills all after a failure, and exits with the highest
# code.
SRUN = """#!{python}
import os, signal, subprocess, sys, time
options, words = dict(), sys.argv[1:]
while words[0].startswith("--"):
    name, _, value = words.pop(0).partition("=")
    options[name] = value
tasks = int(options.get("--ntasks", os.environ["SLURM_NTASKS"]))
per_node = int(options.get("--ntasks-per-node", os.environ["SLURM_NTASKS_PER_NODE"]))
running = []
def forward(number, frame):
    for task in running:
        task.send_signal(number)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, forward)
for rank in range(tasks):
    env = dict(SLURM_PROCID=rank, SLURM_LOCALID=rank % per_node, SLURM_NODEID=rank // per_node, SLURM_NTASKS=tasks)
    running.append(subprocess.Popen(words, env=os.environ | {{name: str(value) for name, value in env.items()}}))
with open({log!r}, "a") as file:
    print("srun", tasks, words[0], file=file)
while any(task.poll() is None for task in running):
    if options.get("--kill-on-bad-exit") == "1" and any(task.poll() for task in running):
        for task in running:
            task.kill()
    time.sleep(0.01)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in running))
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> {log}
[[ $1 != show ]] || printf '%s\\n' localhost other
"""
# Records its flags and environment; exits, waits for a signal or fails, depending on MODE.
STUB = """
import json, os, pathlib, signal, sys, time
flags = sys.argv[1:]
rank = os.environ["RANK"]
out = pathlib.Path([flag for flag in flags if flag.startswith("--out=")][-1][6:])
(out / "checkpoints").mkdir(parents=True, exist_ok=True)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SRUN_CPUS_PER_TASK")
shards = flags[len(flags) - flags[::-1].index("--shards")]
environment = {name: os.environ[name] for name in names}
given = dict(pid=os.getpid(), flags=flags, environment=environment, shards=os.listdir(shards))
signals = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: signals.append(signal.Signals(number).name))
(out / f"{rank}.part").write_text(json.dumps(given))
(out / f"{rank}.part").rename(out / f"{rank}.json")
mode = os.environ["MODE"]
if mode == "crash" and rank == "1":
    sys.exit(3)
while mode != "finish" and not signals:
    time.sleep(0.01)
(out / f"{rank}.signals").write_text(" ".join(signals))
if rank == "0":
    if mode != "forget":
        (out / "checkpoints" / "last.tmp").write_text(mode)
        (out / "checkpoints" / "last.tmp").replace(out / "checkpoints" / "last.pt")
    if mode in ("finish", "finish late"):
        (out / "finished").touch()
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]  # Slurm would ignore them
    assert sum(line.startswith("#SBATCH") for line in lines[:first]) > 5
    if checker := shutil.which("shellcheck"):
        found = subprocess.run([checker, script], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


class Cluster:
    """A folder to submit from, with stubs for Slurm's commands on PATH."""

    def __init__(self, folder: Path, nodes: int = 1, tasks_per_node: int = 2) -> None:
        self.folder, self.out, self.log = folder, folder / "a run", folder / "slurm.log"
        self.job = str(os.getpid())  # determines the port, which concurrent test runs must not share
        self.programs, self.shards, self.scratch = (folder / name for name in ("bin", "my shards", "scratch"))
        for place in (self.programs, self.shards / "deep", self.scratch):
            place.mkdir(parents=True)
        for name in ("index.json", "shard-00000.h5", "deep/x"):
            (self.shards / name).write_text(name)
        (folder / "train.py").write_text(STUB)
        write_program(self.programs / "srun", SRUN.format(python=sys.executable, log=str(self.log)))
        write_program(self.programs / "scontrol", SCONTROL.format(log=self.log))
        self.environment = {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "SLURM_JOB_ID": self.job,
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_NTASKS": str(nodes * tasks_per_node),
            "SLURM_NTASKS_PER_NODE": str(tasks_per_node),
            "SLURM_CPUS_PER_TASK": "6",
        }

    def start(self, mode: str, *flags: str | Path, **environment: str) -> subprocess.Popen[str]:
        """Start a copy of the batch script in the folder of submission, as Slurm does."""
        script = shutil.copy(TRAIN, self.folder / "slurm_script")
        return subprocess.Popen(
            ["bash", script, *(flags or ("--shards", self.shards, f"--out={self.out}", "--scale", "2"))],
            cwd=self.folder,
            env=self.environment | {"MODE": mode} | environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, mode: str, *flags: str | Path, **environment: str) -> tuple[int, str]:
        """Run the batch script; return its exit code and standard error."""
        return self.end(self.start(mode, *flags, **environment))

    def end(self, batch: subprocess.Popen[str]) -> tuple[int, str]:
        """Wait for the batch script; after a minute, kill it and its children."""
        try:
            _, errors = batch.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(batch.pid, signal.SIGKILL)
            batch.communicate()
            raise
        return batch.returncode, errors

    def training(self, ranks: int = 2) -> None:
        """Wait until all ranks are running."""
        wait_for(lambda: len(list(self.out.glob("*.json"))) == ranks)

    def given(self, rank: int) -> dict[str, Any]:
        """Return the flags and environment of a rank."""
        content: dict[str, Any] = json.loads((self.out / f"{rank}.json").read_text())
        return content

    def requeued(self) -> bool:
        """Return True if the job was requeued."""
        return f"scontrol requeue {self.job}" in self.log.read_text().splitlines()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_ranks_get_their_environment(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, nodes=2)
    assert cluster.run("finish") == (0, "")
    expected = ["--shards", str(cluster.shards), f"--out={cluster.out}", "--scale", "2", "--resume", "auto"]
    for rank in range(4):
        given = cluster.given(rank)
        assert given["flags"] == expected
        assert given["environment"] == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % 2),
            "WORLD_SIZE": "4",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(10000 + os.getpid() % 20000),
            "SRUN_CPUS_PER_TASK": "6",
        }
    assert not cluster.requeued()


def test_a_job_near_its_time_limit_saves_and_is_requeued(cluster: Cluster) -> None:
    for _ in range(2):  # again after requeueing: each time with a new checkpoint
        batch = cluster.start("wait")
        cluster.training()
        batch.send_signal(signal.SIGUSR1)
        code, errors = cluster.end(batch)
        assert code == 0
        assert "time limit approaching: asking train.py to save\n" in errors
        assert f"not finished: requeueing job {cluster.job}\n" in errors
        assert [(cluster.out / f"{rank}.signals").read_text() for rank in (0, 1)] == ["SIGUSR1"] * 2
        assert cluster.requeued()
        cluster.log.unlink()
        for path in cluster.out.glob("*.json"):
            path.unlink()
    assert cluster.run("finish")[0] == 0
    assert not cluster.requeued()


def test_a_run_that_finishes_near_the_time_limit_is_not_requeued(cluster: Cluster) -> None:
    batch = cluster.start("finish late")
    cluster.training()
    batch.send_signal(signal.SIGUSR1)
    assert cluster.end(batch)[0] == 0
    assert (cluster.out / "finished").exists()
    assert not cluster.requeued()


def test_a_job_without_progress_is_not_requeued(cluster: Cluster) -> None:
    batch = cluster.start("forget")
    cluster.training()
    batch.send_signal(signal.SIGUSR1)
    code, errors = cluster.end(batch)
    assert code == 1
    assert "no checkpoint was saved during this run" in errors
    assert not cluster.requeued()


def test_a_failure_is_not_requeued(cluster: Cluster) -> None:
    code, errors = cluster.run("crash")
    assert code == 137  # of the other rank, killed by srun
    assert "ended with status 137 before all iterations were done" in errors
    assert not cluster.requeued()


def test_a_cancelled_job_saves_and_is_not_requeued(cluster: Cluster) -> None:
    batch = cluster.start("wait")
    cluster.training()
    batch.send_signal(signal.SIGTERM)  # as Slurm signals the shell
    time.sleep(0.2)
    assert batch.poll() is None  # waits for the tasks to save
    for rank in (0, 1):  # as Slurm signals the tasks
        os.kill(cluster.given(rank)["pid"], signal.SIGTERM)
    code, errors = cluster.end(batch)
    assert code == 1
    assert "submit it again to resume" in errors
    assert (cluster.out / "checkpoints" / "last.pt").exists()
    assert not cluster.requeued()


def real_shards(cluster: Cluster, source: Path) -> list[str]:
    """Copy a dataset into the cluster's shards folder, next to other files and links; return its file names."""
    (cluster.shards / "shard-00000.h5").unlink()
    for path in source.iterdir():
        shutil.copy(path, cluster.shards)
    names = sorted(path.name for path in source.iterdir())
    (cluster.shards / "shard-00000.h5").rename(cluster.shards / "pixels")
    (cluster.shards / "shard-00000.h5").symlink_to("pixels")  # a link within the folder is allowed
    (cluster.shards / "shard-00009.h5").symlink_to(cluster.folder / "train.py")  # not in the index
    (cluster.shards / "home").symlink_to(cluster.folder)
    return names


@pytest.mark.parametrize("variable", ["SLURM_TMPDIR", "TMPDIR"])
def test_shards_are_staged_when_asked(cluster: Cluster, training_shards: Path, variable: str) -> None:
    """Only the dataset is copied, not the targets of other links in its folder."""
    names = real_shards(cluster, training_shards)
    before = sorted(path.name for path in cluster.shards.iterdir())
    code, errors = cluster.run("finish", STAGE="1", **{variable: str(cluster.scratch)})
    assert code == 0
    staged = cluster.scratch / f"srshards-{cluster.job}"
    assert f"shards copied from {cluster.shards} to {staged} on each node" in errors
    given = cluster.given(0)
    assert given["flags"][-4:] == ["--shards", str(staged), "--resume", "auto"]
    assert sorted(given["shards"]) == names
    assert not list(cluster.scratch.iterdir())  # removed at the end
    assert sorted(path.name for path in cluster.shards.iterdir()) == before


def test_shards_are_read_in_place_unless_asked(cluster: Cluster) -> None:
    assert cluster.run("finish", TMPDIR=str(cluster.scratch)) == (0, "")
    assert cluster.given(0)["flags"][:2] == ["--shards", str(cluster.shards)]
    assert cluster.log.read_text().count("srun") == 1


def test_shards_that_cannot_be_copied_are_read_in_place(cluster: Cluster, training_shards: Path) -> None:
    real_shards(cluster, training_shards)
    (cluster.shards / "shard-00001.h5").unlink()
    (cluster.shards / "shard-00001.h5").symlink_to(training_shards / "shard-00001.h5")  # outside the folder
    code, errors = cluster.run("finish", STAGE="1", TMPDIR=str(cluster.scratch))
    assert code == 0
    assert "shard-00001.h5: file: expected a file in this folder, got a link to " in errors
    assert f"could not be copied to {cluster.scratch} on each node: reading {cluster.shards} in place" in errors
    assert "srshards-" not in " ".join(cluster.given(0)["flags"])
    assert not list(cluster.scratch.iterdir())


def test_without_local_storage_shards_are_read_in_place(cluster: Cluster) -> None:
    code, errors = cluster.run("finish", STAGE="1")
    assert code == 0
    assert f"neither SLURM_TMPDIR nor TMPDIR is set: reading {cluster.shards} in place" in errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--shards", "s"), "expected --out among the flags, got: --shards s\n"),
        (("--out", "o"), "expected --shards among the flags with STAGE=1, got: --out o\n"),
    ],
)
def test_missing_flags_are_refused(cluster: Cluster, flags: tuple[str, ...], message: str) -> None:
    code, errors = cluster.run("finish", *flags, STAGE="1", TMPDIR=str(cluster.scratch))
    assert code == 2
    assert message in errors
    assert not cluster.log.exists()


def test_submitting_outside_the_checkout_is_refused(cluster: Cluster) -> None:
    (cluster.folder / "train.py").unlink()
    code, errors = cluster.run("finish")
    assert code == 2
    assert f"expected to be submitted from the folder of train.py, got {cluster.folder}\n" in errors


def test_a_real_training_resumes_after_the_time_limit(cluster: Cluster, training_shards: Path) -> None:
    (cluster.folder / "train.py").unlink()
    (cluster.folder / "train.py").symlink_to(TRAIN.parent.parent / "train.py")
    small = ["--lr-patch", "12", "--batch-size", "2", "--log-every", "1", "--device", "cpu", "--workers", "1"]
    flags = ["--shards", str(training_shards), "--scale", "2", "--out", str(cluster.out), *small]

    def iterations() -> list[int]:
        log = cluster.out / "metrics.jsonl"
        return [json.loads(line)["iteration"] for line in log.read_text().splitlines()] if log.exists() else []

    batch = cluster.start("", *flags, "--iterations", "100000", OMP_NUM_THREADS="1")
    wait_for(lambda: len(iterations()) >= 2 or batch.poll() is not None)
    batch.send_signal(signal.SIGUSR1)
    code, errors = cluster.end(batch)
    assert code == 0, errors
    assert cluster.requeued()
    done = iterations()[-1]
    cluster.log.unlink()
    code, errors = cluster.run("", *flags, "--iterations", str(done + 2), OMP_NUM_THREADS="1")
    assert code == 0, errors
    assert (cluster.out / "finished").exists()
    assert iterations() == list(range(1, done + 3))
    assert not cluster.requeued()


def test_shards_are_built_with_a_worker_per_core(folder: Path, tmp_path: Path) -> None:
    prep = Path(sys.executable).with_name("prep")
    words = [str(folder), "--scale", "2", "--out", str(tmp_path / "shards")]
    write_program(tmp_path / "seen", f'#!/bin/bash\necho "$@" >&2\nexec {prep} "$@"\n')
    environment = os.environ | {"PREP": str(tmp_path / "seen"), "SLURM_CPUS_PER_TASK": "2"}
    done = subprocess.run(["bash", BUILD, *words], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[0] == f"build-shards --workers 2 {' '.join(words)}"
    assert (tmp_path / "shards" / "index.json").exists()


def test_a_build_near_its_time_limit_is_requeued_and_resumes(tmp_path: Path) -> None:
    for i in range(12):
        write_image(tmp_path / "in" / f"{i}.png", photograph(600, 800, seed=i))
    log = tmp_path / "slurm.log"
    write_program(tmp_path / "scontrol", SCONTROL.format(log=log))
    environment = os.environ | {
        "PREP": str(Path(sys.executable).with_name("prep")),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
    }
    out = tmp_path / "out"
    words = [str(tmp_path / "in"), "--scale", "2", "--images-per-shard", "1", "--out", str(out)]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(["bash", str(BUILD), *words], env=environment, stderr=subprocess.PIPE, text=True)

    with start() as batch:
        wait_for(lambda: len(list(out.glob("*.h5.json"))) >= 2 or batch.poll() is not None)
        batch.send_signal(signal.SIGUSR1)
        _, errors = batch.communicate(timeout=60)
    assert batch.returncode == 0, errors
    assert "shards are finished; run the same command to resume" in errors
    assert log.read_text() == "scontrol requeue 7\n"
    assert not (out / "index.json").exists()
    log.unlink()
    with start() as batch:
        _, errors = batch.communicate(timeout=60)
    assert batch.returncode == 0, errors
    assert "shards are already finished" in errors
    assert len(list(out.glob("*.h5"))) == 12
    assert not log.exists()
