"""A run's folder: locking, planted links, full disks, closed pipes, the log."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from trainings import command, invoke, last, resume, start, without_warnings

from loader.errors import ShardsError
from loader.system.lockfile import holder_of
from loader.system.safefile import open_to_write
from model.metrics import Scores
from model.run_log import read_log, score_of
from model.training import saving
from model.training.lock import LOCK, locked
from model.training.ranks import Ranks
from model.training.reporter import Reporter
from model.training.settings import Config
from model.training.stopping import StopRequest

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = Ranks(0, 1, torch.device("cpu"))
INFINITY = float("inf")


def reports(folder: Path, iteration: int = 0) -> Reporter:
    return Reporter(Config("s", 2, str(folder)), ALONE, iteration, StopRequest())


def lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


HOLD = "import sys, pathlib; from model.training.lock import locked\nwith locked(pathlib.Path(sys.argv[1])):\n"


def hold(folder: Path, then: str = " print('held', flush=True); sys.stdin.read()") -> subprocess.Popen[str]:
    """Hold a folder's lock in another process until its standard input is closed."""
    words = [sys.executable, "-c", HOLD + then, str(folder)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_two_trainings_do_not_share_a_folder(training_shards: Path, tmp_path: Path) -> None:
    assert invoke(training_shards, tmp_path / "a", "--iterations", 1).exit_code == 0
    before = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    with hold(tmp_path / "a") as other:
        for result in (
            resume(tmp_path / "a", "--iterations", 2),
            invoke(training_shards, tmp_path / "a", "--iterations", 2),
        ):
            assert result.exit_code == 1
            assert "a: expected no other training at work there, got process" in result.stderr
            assert f"process {other.pid} on" in result.stderr
        other.communicate("", timeout=120)
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == before
    assert resume(tmp_path / "a", "--iterations", 2).exit_code == 0
    assert not (tmp_path / "a" / LOCK).exists()


def test_a_lock_ends_with_its_process_even_if_children_live_on(tmp_path: Path) -> None:
    then = (
        " import subprocess; child = subprocess.Popen(['sleep', '300'])\n print('held', flush=True)\n"
        " print(child.pid, flush=True); sys.stdin.read()"
    )
    with hold(tmp_path / "a", then) as other:
        assert other.stdout is not None
        child = int(other.stdout.readline())
        with pytest.raises(ShardsError, match="expected no other training"), locked(tmp_path / "a"):
            pass
        other.kill()
        other.wait(120)
        try:
            assert (tmp_path / "a" / LOCK).exists()
            with locked(tmp_path / "a") as message:
                assert message is None
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a" / "b"):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "x").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["x"]


def test_missing_support_for_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", none)
    with locked(tmp_path / "a") as message:
        assert message is not None
        assert "this file system has no locks" in message


def test_a_lock_is_not_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("dear")
    (tmp_path / "a").mkdir()
    for plant in (os.symlink, os.link):
        plant(victim, tmp_path / "a" / LOCK)
        with (
            pytest.raises(ShardsError, match="expected a lock file, got (a link|one with 2 names)"),
            locked(tmp_path / "a"),
        ):
            pass
        assert victim.read_text() == "dear"
        (tmp_path / "a" / LOCK).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "a" / LOCK)
    with pytest.raises(ShardsError, match="expected a lock file, got a pipe"), locked(tmp_path / "a"):
        pass


@pytest.mark.parametrize("text", ["", "{", "[" * 4000, '{"pid": 1}', '{"pid": "\\u001b[2J", "host": "h", "since": 0}'])
def test_any_lock_file_text_is_printed_safely(text: str, tmp_path: Path) -> None:
    path = tmp_path / LOCK
    path.write_text(text)
    descriptor = os.open(path, os.O_RDONLY)
    assert holder_of(descriptor).isprintable()
    os.close(descriptor)


def test_the_log_is_not_written_through_a_link(tmp_path: Path) -> None:
    """A link that replaced the log after the run started."""
    reports(tmp_path)
    (tmp_path / "victim").write_text("dear")
    kept = reports(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("victim")
    with pytest.raises(OSError, match=r"metrics.jsonl: a link, which is not written through"):
        kept.record(1, {"loss": 1.0})
    assert (tmp_path / "victim").read_text() == "dear"
    with pytest.raises(OSError, match="No such device|Is a directory|a folder"):
        os.close(open_to_write(tmp_path))


def test_best_is_not_written_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "victim").write_text("dear")
    (tmp_path / ".best.pt.part").symlink_to("victim")
    (tmp_path / "best.pt").symlink_to("victim")
    saving.save(tmp_path / saving.checkpoint_name(1), {"x": 1}, keep=1)
    (tmp_path / ".best.pt.part").symlink_to("victim")
    for _ in range(2):
        saving.link_as(tmp_path / saving.checkpoint_name(1), saving.BEST)
        assert torch.load(tmp_path / "best.pt", weights_only=True) == {"x": 1}

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(1, "Operation not permitted")  # a file system without hard links

        monkeypatch.setattr(os, "link", refuse)
    assert (tmp_path / "victim").read_text() == "dear"
    saving.save(tmp_path / saving.checkpoint_name(2), {"x": 2}, keep=1)
    assert torch.load(tmp_path / "last.pt", weights_only=True) == {"x": 2}
    assert not list(tmp_path.glob(".*"))


def test_checkpoints_are_sorted_by_iteration(tmp_path: Path) -> None:
    for number in (99_999_999, 100_000_000, 1_000_000_000, 5):
        torch.save({"x": number}, tmp_path / saving.checkpoint_name(number))
    torch.save({}, tmp_path / "iteration-x.pt")
    assert [saving.iteration_of(path) for path in saving.numbered_checkpoints(tmp_path)] == [10**9, 10**8, 10**8 - 1, 5]
    newest = saving.read_newest(tmp_path)
    assert newest is not None
    assert newest[1] == {"x": 10**9}
    saving.save(tmp_path / saving.checkpoint_name(10**9 + 1), {}, keep=2)
    assert [saving.iteration_of(path) for path in saving.numbered_checkpoints(tmp_path)] == [10**9 + 1, 10**9]


def test_later_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    """A run that resumed before a damaged checkpoint keeps its new checkpoints."""
    for number in (1, 2, 9):
        saving.save(tmp_path / saving.checkpoint_name(number), {"x": number}, keep=9)
    (tmp_path / saving.checkpoint_name(9)).write_text("damaged")
    for number in (3, 4):
        saving.save(tmp_path / saving.checkpoint_name(number), {"x": number}, keep=1)
    assert [saving.iteration_of(path) for path in saving.numbered_checkpoints(tmp_path)] == [9, 4]


def test_the_log_is_valid_json(tmp_path: Path) -> None:
    kept = reports(tmp_path)
    kept.record(1, {"loss": float("nan"), "learning_rate": -INFINITY})
    kept.report_scores(2, "a", Scores(INFINITY, 1.0, INFINITY, 1.0), Scores(INFINITY, 1.0, 40.0, 1.0))
    kept.report_scores(3, "b", Scores(30.0, 1.0, 31.0, 1.0))
    assert [entry.get("psnr_y", "none") for entry in lines(tmp_path)] == ["none", "none", None, 31.0]
    again = reports(tmp_path, 3)
    assert (again.best_psnr("a"), again.best_psnr("b"), again.best_psnr("c")) == (INFINITY, 31.0, -INFINITY)
    assert (again.has_score("bicubic_psnr_y", "a"), again.has_score("bicubic_psnr_y", "b")) == (True, False)
    assert (again.has_score("psnr_y", "b", 3), again.has_score("psnr_y", "a", 3)) == (True, False)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "psnr_y": Infinity, "valid": "a", "loss": NaN}\n')
    assert reports(tmp_path, 3).best_psnr("a") == INFINITY  # as earlier versions wrote it
    assert lines(tmp_path)[0]["psnr_y"] is None


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe\n",
        b"[" * 100_000,
        b"1" * 5000,
        b'{"iteration": true}',
        b'{"iteration": "1"}',
        b'{"iteration": 1e999}',
    ],
)
def test_invalid_log_lines_are_skipped(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(text + b'\n{"iteration": 1, "valid": "a", "psnr_y": "much"}')
    assert [entry["iteration"] for entry in read_log(tmp_path / "metrics.jsonl")] == [1]
    assert reports(tmp_path, 1).best_psnr("a") == -INFINITY


def test_a_full_disk_is_a_one_line_error_and_loses_nothing(
    training_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a"
    assert invoke(training_shards, out).exit_code == 0
    write = os.write

    def full(descriptor: int, data: Any) -> int:
        if b'"iteration": 4' in bytes(data):
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    result = resume(out, "--iterations", 6, "--log-every", 1)
    assert result.exit_code == 1
    assert result.stderr == f"Error: {out / 'metrics.jsonl'}: No space left on device\n"
    assert last(out)["iteration"] == 3
    assert not (out / "finished").exists()
    monkeypatch.undo()
    assert resume(out, "--iterations", 4, "--log-every", 1).exit_code == 0
    assert [entry["iteration"] for entry in lines(out)][-1] == 4


def test_a_closed_pipe_saves_the_run(training_shards: Path, tmp_path: Path) -> None:
    words = command(training_shards, tmp_path / "a", "--iterations", 100_000, "--log-every", 1)
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        next(line for line in process.stdout if line.startswith(b"iteration 2/"))
        process.stdout.close()
        output = process.stderr.read()
        assert process.wait(300) == -signal.SIGPIPE
    assert output == b""
    assert last(tmp_path / "a")["iteration"] >= 2
    assert not (tmp_path / "a" / LOCK).exists()


def test_standard_output_on_a_full_device_saves_the_run(training_shards: Path, tmp_path: Path) -> None:
    words = command(training_shards, tmp_path / "a", "--iterations", 100_000, "--log-every", 1)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 1
    assert without_warnings(done.stderr) == "Error: standard output: No space left on device\n"
    assert last(tmp_path / "a")["iteration"] == 0


def test_a_run_is_saved_before_validation(
    training_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ShardsError("an image that cannot be read")

    monkeypatch.setattr("train.network_scores", fails)
    result = invoke(training_shards, tmp_path / "a", "--valid-shards", training_shards, "--validate-every", 2)
    assert result.exit_code == 1
    assert result.stderr == "Error: an image that cannot be read\n"
    assert last(tmp_path / "a")["iteration"] == 2


@pytest.mark.parametrize("late", [True, False])
def test_failures_of_rank_0_alone_are_a_one_line_error(
    training_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Only rank 0 draws sheets and writes checkpoints."""

    def fails(*_: object, **__: object) -> None:
        raise OSError(122, "Disk quota exceeded", "x.png")

    monkeypatch.setattr("train.draw_sheet", fails)
    flags = ["--validate-every", 3 if late else 1]
    result = invoke(training_shards, tmp_path / "a", "--valid-shards", training_shards, *flags)
    assert result.exit_code == 1
    assert result.stderr == "Error: x.png: Disk quota exceeded\n"
    assert last(tmp_path / "a")["iteration"] == flags[1]
    assert not (tmp_path / "a" / "finished").exists()


def test_a_signal_during_the_last_validation(training_shards: Path, tmp_path: Path) -> None:
    """The interrupted validation is repeated after resuming."""
    flags = ["--iterations", 2, "--valid-shards", training_shards, "--validate-every", 2]
    code = (
        "import os, signal, train\nscores = train.network_scores\n"
        "def asked(*words):\n os.kill(os.getpid(), signal.SIGTERM)\n return scores(*words)\n"
        "train.network_scores = asked\ntrain.main()"
    )
    words = command(training_shards, tmp_path / "a", *flags)
    process = start([words[0], "-c", code, *words[2:]])
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert output.splitlines()[-1].startswith("stopped by SIGTERM after iteration 2")
    assert not (tmp_path / "a" / "finished").exists()
    result = resume(tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert "validation at iteration 2/2" in result.stdout
    assert (tmp_path / "a" / "finished").exists()


def test_a_log_that_is_a_pipe_is_refused(training_shards: Path, tmp_path: Path) -> None:
    assert invoke(training_shards, tmp_path / "a", "--iterations", 1).exit_code == 0
    for name in ("metrics.jsonl", "config.toml"):
        moved = shutil.copytree(tmp_path / "a", tmp_path / name)
        (moved / name).unlink()
        os.mkfifo(moved / name)
        result = resume(moved, "--shards", training_shards)
        assert result.exit_code == 1
        assert result.stderr == f"Error: {moved / name}: a pipe, not a regular file\n"


def test_links_out_of_the_folder_are_not_read(training_shards: Path, tmp_path: Path) -> None:
    assert invoke(training_shards, tmp_path / "a", "--iterations", 1).exit_code == 0
    for name in ("metrics.jsonl", "config.toml"):
        moved = Path(shutil.copytree(tmp_path / "a", tmp_path / name))
        (moved / name).rename(tmp_path / f"private {name}")
        (moved / name).symlink_to(tmp_path / f"private {name}")
        result = resume(moved, "--shards", training_shards)
        assert result.exit_code == 1
        assert f"Error: {moved / name}: a link to " in result.stderr


def test_score_of_log_values(tmp_path: Path) -> None:
    assert score_of(None) == INFINITY
    values: list[Callable[[], object]] = [lambda: "x", lambda: [], lambda: float("nan")]
    assert [score_of(one()) for one in values] == [-INFINITY] * 3
