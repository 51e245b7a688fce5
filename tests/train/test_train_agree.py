"""Ranks that differ in files, settings or failures: they train one network, or all exit with one error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from helpers import ROOT, build, photograph, write_image
from trainings import RankForker, command, finish, last, start

from model.run_log import read_log
from model.training import ranks as ranks_module
from model.training import threads
from model.training.ranks import FAILURES, RanksError, describe_error, join_ranks, local_device
from model.training.threads import chosen_by_user, own_cores, threads_of

RANK_PROGRAM = """
import os, sys, torch
from loader.errors import ShardsError
from model.training.ranks import RanksError, join_ranks
with join_ranks("cpu") as ranks:
    texts = ["", "ü" * 1000, "x"]
    assert ranks.gather(texts[ranks.rank]) == texts[: ranks.world_size]
    assert ranks.broadcast(b"12\\0" if ranks.first else b"") == b"12\\0"
    assert ranks.broadcast(b"") == b""
    assert ranks.broadcast_flag(ranks.first) and not ranks.broadcast_flag(not ranks.first)
    ranks.require_equal("this", "same")
    with ranks.fail_together():
        pass
    sys.stdout.write(f"threads {torch.get_num_threads()}\\n")  # at once: ranks share the stream
    sys.stdout.flush()
    mode = sys.argv[1]
    if mode == "fail" and ranks.rank == 1:
        with ranks.fail_together():
            raise ShardsError("a cable is loose")
    if mode == "fail":
        with ranks.fail_together():
            pass
    if mode == "agree":
        ranks.require_equal("that", f"a 1\\nb {ranks.rank}")
    if mode == "lost":
        if ranks.rank == 1:
            os._exit(7)
        ranks.any_of(True)
"""


@pytest.fixture(scope="module")
def forker() -> Iterator[RankForker]:
    """A server that forks ranks."""
    forker = RankForker()
    yield forker
    forker.close()


def errors(ends: list[tuple[int, str]]) -> list[str]:
    """Return the error lines of ranks, all of which must exit with code 1, or all with 2."""
    assert {end for end, _ in ends} in ({1}, {2}), ends
    output = "\n".join(text for _, text in ends)
    assert "Traceback" not in output, output
    return [line for line in output.splitlines() if line.startswith("Error: ")]


def pick(*flags: str) -> str:
    """Return code that runs train.py with each rank's own value of these flags, given as a|b."""
    return (
        f"import sys\nargs = sys.argv[1:]\nfor flag in {flags!r}:\n slot = args.index(flag) + 1\n"
        " args[slot] = args[slot].split('|')[rank]\ntrain.main(args)\n"
    )


def both(one: object, other: object) -> Path:
    return Path(f"{one}|{other}")


@pytest.fixture(scope="module")
def begun(training_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 iterations with checkpoints at 2 and 4."""
    out = tmp_path_factory.mktemp("begun") / "a"
    flags = ["--valid-shards", training_shards, "--validate-every", 2]
    finish(start(command(training_shards, out, "--iterations", 4, "--checkpoint-every", 2, "--log-every", 1, *flags)))
    return out


def test_ranks_exchange_values(forker: RankForker) -> None:
    for ending in forker.run([""], RANK_PROGRAM, 3):
        assert ending == (0, "threads 1\n")  # from OMP_NUM_THREADS


def test_an_error_on_one_rank_stops_all(forker: RankForker) -> None:
    (first, output), (second, silent) = forker.run(["fail"], RANK_PROGRAM)
    assert (first, second) == (1, 1)
    assert output.splitlines()[-1].endswith("RanksError: rank 1: a cable is loose")
    assert silent == "threads 1\n"


def test_differences_between_ranks_are_reported(forker: RankForker) -> None:
    (first, output), (second, _) = forker.run(["agree"], RANK_PROGRAM)
    assert (first, second) == (1, 1)
    assert output.splitlines()[-1].endswith("that: expected the same on all ranks, got b 0 on rank 0 and b 1 on rank 1")


def test_a_lost_rank_is_reported(forker: RankForker) -> None:
    (first, output), (second, _) = forker.run(["lost"], RANK_PROGRAM)
    assert (first, second) == (1, 7)
    assert "rank 0: lost the other ranks; see the error of the rank that failed" in output


@pytest.mark.parametrize(
    "there",
    [
        "a damaged one",
        *(pytest.param(one, marks=pytest.mark.long) for one in ("nothing", "an older one", "a newer one")),
    ],
)
def test_rank_0_chooses_the_checkpoint_to_resume_from(
    there: str, begun: Path, training_shards: Path, tmp_path: Path, forker: RankForker
) -> None:
    """Nodes with folders of their own: all ranks resume from rank 0's checkpoint, whatever theirs contain."""
    first, second = Path(shutil.copytree(begun, tmp_path / "first")), tmp_path / "second"
    if there != "nothing":
        shutil.copytree(begun, second)
        newest = second / "checkpoints" / "iteration-00000004.pt"
        (second / "checkpoints" / "last.pt").unlink()
        if there == "an older one":
            newest.unlink()
            (second / "metrics.jsonl").unlink()
        elif there == "a damaged one":
            newest.write_bytes(newest.read_bytes()[:-9])
        else:
            newest.rename(newest.with_name("iteration-00000009.pt"))
    flags = ["--iterations", 6, "--resume", "auto", "--valid-shards", training_shards, "--validate-every", 2]
    ends = forker.run(command(training_shards, both(first, second), *flags)[2:], pick("--out"))
    assert [code for code, _ in ends] == [0, 0], ends
    assert "4 iterations done" in ends[0][1]
    assert "iteration" not in ends[1][1]  # only rank 0 reports
    assert last(first)["iteration"] == 6
    assert not list(second.glob("*.lock"))
    assert [entry["iteration"] for entry in read_log(first / "metrics.jsonl") if "psnr_y" in entry] == [2, 4, 6]


def test_different_datasets_stop_all_ranks(
    training_shards: Path, photographs: Path, tmp_path: Path, forker: RankForker
) -> None:
    others = Path(shutil.copytree(photographs, tmp_path / "others"))
    write_image(others / "one.png", photograph(64, 80))
    other = build(others, tmp_path / "other", scales=(2,))
    words = command(both(training_shards, other), tmp_path / "a", "--iterations", 2)[2:]
    (error,) = errors(forker.run(words, pick("--shards")))
    assert error.startswith("Error: datasets: expected the same on all ranks, got --shards ")
    assert not (tmp_path / "a").exists()


def test_an_unreadable_dataset_on_one_rank_stops_all(training_shards: Path, tmp_path: Path, forker: RankForker) -> None:
    words = command(both(training_shards, tmp_path / "absent"), tmp_path / "a", "--iterations", 2)[2:]
    (error,) = errors(forker.run(words, pick("--shards")))
    assert error.startswith("Error: rank 1: ")
    assert "absent" in error


def test_different_settings_stop_all_ranks(training_shards: Path, tmp_path: Path, forker: RankForker) -> None:
    words = command(training_shards, tmp_path / "a", "--iterations", 2, "--learning-rate", "0.001|0.0001")[2:]
    text = "expected the same on all ranks, got --learning-rate 0.001 on rank 0 and --learning-rate 0.0001 on rank 1"
    assert errors(forker.run(words, pick("--learning-rate"))) == [f"Error: settings: {text}"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        # A damaged shard, a sheet that cannot be drawn, a checkpoint that cannot be written or read.
        ("if rank == 1: train.PatchLoader.__iter__ = lambda self: Broken()", "rank 1: a cable is loose"),
        ("if rank == 0: train.draw_sheet = fails", "a cable is loose"),
        ("if rank == 0: train.saving.save = fails", "a cable is loose"),
        ("if rank == 1: model.training.validation.score_pairs = fails", "rank 1: a cable is loose"),
        ("if rank == 1: train.from_checkpoint = fails", "rank 1: "),
    ],
)
def test_a_failure_on_one_rank_stops_all(
    change: str, text: str, begun: Path, training_shards: Path, tmp_path: Path, forker: RankForker
) -> None:
    out = Path(shutil.copytree(begun, tmp_path / "a"))
    flags = ["--resume", "auto", "--iterations", 1000, "--validate-every", 5, "--valid-shards", training_shards]
    code = (
        "import model.training.validation\nfrom loader import ShardsError\n"
        "class Broken:\n def __next__(self):\n  raise ShardsError('a cable is loose')\n"
        "def fails(*_, **__):\n raise ShardsError('a cable is loose')\n"
        f"{change}\ntrain.main()"
    )
    (error,) = errors(forker.run(command(training_shards, out, *flags)[2:], code))
    assert text in error
    assert "a cable is loose" in error
    assert not (out / "train.lock").exists()


def test_different_weights_after_restoring_stop_all_ranks(
    begun: Path, training_shards: Path, tmp_path: Path, forker: RankForker
) -> None:
    out = Path(shutil.copytree(begun, tmp_path / "a"))
    code = (
        "import torch\nrestore = train.from_checkpoint\n"
        "def other(content, state, *rest):\n position = restore(content, state, *rest)\n"
        " if rank: torch.nn.init.zeros_(state.ema.tail.bias)\n return position\n"
        "train.from_checkpoint = other\ntrain.main()"
    )
    (error,) = errors(forker.run(command(training_shards, out, "--resume", "auto", "--iterations", 6)[2:], code))
    assert error.startswith("Error: weights, moments and iteration: expected the same on all ranks, got ")


def test_an_unusable_device_on_one_rank_stops_all(training_shards: Path, tmp_path: Path, forker: RankForker) -> None:
    words = command(training_shards, tmp_path / "a", "--iterations", 2, "--device", "cpu|meta")[2:]
    (error,) = errors(forker.run(words, "import sys\nsys.argv[-1] = sys.argv[-1].split('|')[rank]\ntrain.main()"))
    assert error.startswith("Error: --device cpu: rank 1: ")
    assert "cannot use 'meta'" in error


def test_ranks_split_the_cores_they_share() -> None:
    assert threads_of(0, ["a 0 1 2 3 4 5"]) == 6
    assert threads_of(1, ["a 0 1 2 3", "a 0 1 2 3"]) == 2
    assert threads_of(1, ["a 0 1", "a 0 1", "a 0 1"]) == 1
    assert threads_of(0, ["a 0 1", "a 2 3", "b 0 1", "b 0 1"]) == 2  # disjoint cores per task, as on a cluster
    assert threads_of(2, ["a 0 1", "a 2 3", "b 0 1", "b 0 1"]) == 1
    assert threads_of(0, ["a 0 1 2", "a 2 3 4"]) == 2
    assert len(own_cores().split()) == 1 + len(os.sched_getaffinity(0))


def test_torchruns_thread_number_is_told_from_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun sets OMP_NUM_THREADS to 1 if the user did not; a shell may run between torchrun and its ranks."""
    processes: dict[tuple[int, str], bytes] = {}
    monkeypatch.setattr(threads, "_of", lambda process, name: processes[process, name])
    monkeypatch.setattr(os, "getppid", lambda: 30)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert not chosen_by_user()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert chosen_by_user()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    processes[30, "environ"] = b"A=1\0TORCHELASTIC_RUN_ID=x\0OMP_NUM_THREADS=1\0"
    processes[30, "stat"] = b"30 (a) shell) S 20 1 1"
    for outer, chosen in ((b"OMP_NUM_THREADS=1\0B=2", True), (b"B=2\0", False), (b"", False)):
        processes[20, "environ"] = outer
        assert chosen_by_user() == chosen
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert chosen_by_user()

    def hidden(*_: object) -> bytes:
        raise PermissionError

    monkeypatch.setattr(threads, "_of", hidden)
    assert chosen_by_user()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert not chosen_by_user()


def test_ranks_started_by_a_cluster_split_the_cores(forker: RankForker) -> None:
    """Two ranks on one machine use half of the cores each, unless the user set OMP_NUM_THREADS."""
    code = (
        "import os, torch\nfrom model.training.ranks import join_ranks\ncores = len(os.sched_getaffinity(0))\n"
        "torch.set_num_threads(cores)\n{}\n"
        "with join_ranks('cpu'):\n print(torch.get_num_threads() == {})\n"
    )
    for unset, expected in (("os.environ.pop('OMP_NUM_THREADS')", "max(1, cores // 2)"), ("", "cores")):
        assert forker.run([], code.format(unset, expected)) == [(0, "True\n")] * 2


@pytest.mark.long
def test_torchruns_default_of_one_thread_is_ignored(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK_PROGRAM)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), ""]
    cores = len(os.sched_getaffinity(0))
    for given, expected in ((None, max(1, cores // 2)), (str(cores), cores), ("1", 1)):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PYTHONPATH": str(ROOT)}
        environment |= {"OMP_NUM_THREADS": given} if given else {}
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.split()) == sorted(["threads", str(expected)] * 2)


def test_ranks_touch_only_their_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA mocked: the local rank's device is chosen before anything is allocated."""
    touched: list[Any] = []
    zeros = torch.zeros

    def allocate(*size: int, device: Any = None) -> torch.Tensor:
        touched.append(torch.device(device))
        return zeros(*size)

    monkeypatch.setattr(torch, "zeros", allocate)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", touched.append)
    for name in ("auto", "cuda"):
        assert local_device(name, 1) == torch.device("cuda:1")
    assert local_device("cuda:0", 1) == torch.device("cuda:0")  # an explicit device wins
    assert touched == [torch.device("cuda:1")] * 4 + [torch.device("cuda:0")] * 2
    with pytest.raises(click.BadParameter, match="no GPU for local rank 2: this machine has 2"):
        local_device("auto", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert local_device("auto", 5) == torch.device("cuda:0")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK"])
def test_non_numeric_rank_variables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "two")
    with pytest.raises(click.UsageError, match=f"{name}: expected a whole number, got 'two'"), join_ranks("cpu"):
        pass


def test_errors_are_one_line() -> None:
    cases: list[tuple[Callable[[], Exception], str]] = [
        (lambda: OSError(28, "No space left on device", b"a\xff\n"), "a\\udcff\\n: No space left on device"),
        (MemoryError, "out of memory"),
        (lambda: click.UsageError("a\nb"), "a\\nb"),
        (lambda: RanksError("\x1b[2J"), "\\x1b[2J"),
        (lambda: OSError("x"), "x"),
        (lambda: RanksError(""), "RanksError"),
    ]
    for make, text in cases:
        assert isinstance(make(), FAILURES)
        assert describe_error(make()) == text
    assert not ranks_module._is_lost_rank(RuntimeError("a bug"))
