"""Commands when the system refuses threads (`ulimit -u`, `ulimit -v`)."""

import threading
from pathlib import Path

import click
import pytest
import tqdm
from click.testing import CliRunner

from loader.system.limits import startable_threads
from prep.cli import main
from prep.console.unix import UnixCommand


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of threads that can be started, in a list, for a test to change."""
    start, base, allowed = threading.Thread.start, threading.active_count(), [0]

    def limited(self: threading.Thread) -> None:
        if threading.active_count() - base >= allowed[0]:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", limited)
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)  # tqdm warns if its monitor thread cannot start
    return allowed


@pytest.mark.parametrize("most", [0, 1, 3, 9])
def test_startable_threads(limit: list[int], most: int) -> None:
    limit[0] = most
    before = threading.active_count()
    assert startable_threads(5) == min(most, 5)
    assert threading.active_count() == before


@pytest.mark.parametrize("most", [0, 1, 2])
def test_verify_works_with_fewer_threads(dataset: Path, folder: Path, limit: list[int], most: int) -> None:
    limit[0] = most
    result = CliRunner().invoke(main, ["verify", str(dataset), "--workers", "4", "--source", str(folder)])
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("everything matches the index and the sources\n")


def test_bench_names_what_it_could_not_measure(dataset: Path, limit: list[int]) -> None:
    words = ["bench", str(dataset), "--lr-patch", "8", "--batch-size", "4", "--seconds", "0.4"]
    limit[0] = 6  # enough for the reader of one mode, too few for positional reads
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "io='pread' was not measured: expected room for 36 threads, got 6" in result.output
    limit[0] = 0
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert "io='mmap': srshards-gather: expected to start a thread, got: can't start new thread" in result.output
    assert "io='pread': expected room for 36 threads, got 0 (see ulimit -u and -v)" in result.output


def test_a_refused_thread_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(text: str) -> None:
        raise RuntimeError(text)

    with pytest.raises(SystemExit) as ended:
        UnixCommand("x", callback=lambda: fail("can't start new thread")).main([])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "Error: cannot start another thread (see ulimit -u and -v)\n"
    with pytest.raises(RuntimeError, match="a bug"):
        click.Command.main(UnixCommand("x", callback=lambda: fail("a bug")), [])
