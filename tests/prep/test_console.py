"""Commands as Unix tools: closed, broken and full standard streams; streams replaced by tests and notebooks."""

import io
import os
import re
import signal
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from helpers import build

from prep.console.progress import Progress
from prep.console.unix import UnixGroup, tell

HEAD = "import sys, os, click\nfrom prep.console.unix import UnixCommand, UnixGroup, tell\n"
LINES = (
    HEAD
    + """
@click.command(cls=UnixCommand)
@click.argument("count", type=int)
def main(count):
    for i in range(count):
        click.echo(f"line {i}")
    tell("told")
main()
"""
)
GROUP = (
    HEAD
    + """
@click.group(cls=UnixGroup)
def main(): pass
@main.command(cls=UnixCommand)
@click.argument("count", type=int)
def lines(count):
    for i in range(count):
        print(f"line {i}")
@main.command()
def fail():
    print("partly")
    raise click.ClickException("of its own")
@main.command()
def descriptors():
    file = os.open(os.devnull, os.O_RDONLY)
    open(sys.argv[-1] if False else os.environ["TOLD"], "w").write(str(file))
@main.command()
def memory():
    raise MemoryError("unable to allocate 9 TiB")
@main.command()
def bug():
    tell("x" * 9)
    raise OSError(28, "No space left on device", "some/file")
main()
"""
)
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def shell(line: str, code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a line of bash, in which $RUN stands for the Python code."""
    return subprocess.run(
        ["bash", "-c", line.replace("$RUN", '"$PYTHON" -c "$CODE"')],
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT | {"CODE": code, "PYTHON": sys.executable, **environment},
        check=False,
    )


@pytest.mark.parametrize(("code", "words"), [(LINES, ""), (GROUP, "lines")])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_pipe(code: str, words: str, unbuffered: str) -> None:
    """With many lines the pipe breaks at a write, with few at the final flush."""
    for count in (1, 100_000):
        ended = shell(
            f"$RUN {words} {count} | true; echo ${{PIPESTATUS[0]}}", "import time; time.sleep(.3)\n" + code,
            PYTHONUNBUFFERED=unbuffered,
        )  # fmt: skip
        assert ended.stdout.strip() == str(128 + signal.SIGPIPE)
        assert ended.stderr in ("", "told\n")


@pytest.mark.parametrize(("code", "words"), [(LINES, "9"), (LINES, "99999"), (GROUP, "lines 9"), (GROUP, "fail"),
                                             (LINES, "--help"), (GROUP, "lines --help")])  # fmt: skip
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_full_device(code: str, words: str, unbuffered: str) -> None:
    ended = shell(f"$RUN {words} > /dev/full", code, PYTHONUNBUFFERED=unbuffered)
    assert ended.returncode == 1
    assert "Error: standard output: No space left on device\n" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr


@pytest.mark.parametrize("stream", ["2>&-", "2>/dev/full", "2> >(true)"])
def test_broken_standard_error_is_ignored(stream: str) -> None:
    assert shell(f"$RUN 2 {stream}", LINES).stdout == "line 0\nline 1\n"
    assert shell(f"$RUN 2 {stream}; echo $?", LINES).stdout.endswith("1\n0\n")
    assert shell(f"$RUN fail {stream}; echo $?", GROUP).stdout == "partly\n1\n"
    assert shell(f"$RUN nothing-such {stream}; echo $?", GROUP).stdout == "2\n"


def test_files_do_not_get_the_numbers_of_closed_streams(tmp_path: Path) -> None:
    told = tmp_path / "number"
    for streams in ("2>&-", ">&- 2>&-", "<&- >&- 2>&-", "<&-", ">&-"):
        ended = shell(f"$RUN descriptors {streams}", GROUP, TOLD=str(told))
        assert (ended.returncode, ended.stderr) == (0, "")
        assert int(told.read_text()) > 2
        told.unlink()
    assert shell("$RUN 3 >&-", LINES).returncode == 0


def test_descriptor_opened_by_an_import_is_not_written_to(tmp_path: Path) -> None:
    """Standard error was closed when Python started, and an import opened a file before the command ran."""
    precious = tmp_path / "precious"
    precious.write_text("")
    code = f"import os; got = os.open({str(precious)!r}, os.O_RDWR); assert got == 2\n" + LINES
    assert shell("$RUN 1 2>&-", code).stdout == "line 0\n"
    assert precious.read_text() == ""


def test_file_errors_are_not_mistaken_for_output_errors() -> None:
    ended = shell("$RUN bug", GROUP)
    assert "some/file" in ended.stderr
    assert "standard output" not in ended.stderr


def test_out_of_memory_is_a_one_line_error() -> None:
    ended = shell("$RUN memory", GROUP)
    assert ended.returncode == 1
    assert ended.stderr == "Error: out of memory (unable to allocate 9 TiB)\n"


def test_characters_the_locale_cannot_print_are_escaped() -> None:
    code = HEAD + "main = UnixCommand('x', callback=lambda: print('\\u00fc \\u03a9 \\udce4'))\nmain()"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=120, check=False,
        env=ENVIRONMENT | {"PYTHONIOENCODING": "latin-1:strict"},
    )  # fmt: skip
    assert ended.stdout == b"\xfc \\u03a9 \\udce4\n"


def test_replaced_streams_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in click's runner, pytest or a notebook. The process's own streams are restored afterwards."""

    @click.group(cls=UnixGroup)
    def main() -> None:
        pass

    @main.command()
    def hello() -> None:
        click.echo("out")
        tell("err")

    before = sys.stdout, sys.stderr
    result = CliRunner().invoke(main, ["hello"])
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 0)
    monkeypatch.setattr(sys, "stdout", written := io.StringIO())
    assert main.main(["hello"], standalone_mode=False) is None
    assert written.getvalue() == "out\n"
    monkeypatch.undo()
    assert (sys.stdout, sys.stderr) == before


def test_prep_with_broken_streams(folder: Path, tmp_path: Path) -> None:
    """The complete command, with the streams that a job may give it."""
    dataset = build(folder, tmp_path / "out")
    run = f"from prep.cli import main; main(['verify', {str(dataset)!r}, '--workers', '1'])"
    ended = shell("$RUN 2>&-", run)
    assert ended.returncode == 0
    assert re.search("5 images in 3 shards, .*: everything matches the index\n", ended.stdout)
    ended = shell("$RUN > /dev/full", run)
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (
        1, "Error: standard output: No space left on device",
    )  # fmt: skip
    assert shell("$RUN | true; echo ${PIPESTATUS[0]}", run).stdout == "141\n"


def test_progress_without_a_total(capsys: pytest.CaptureFixture[str]) -> None:
    now = iter([0.0, 4.0, 11.0])
    with Progress(None, "image", clock=lambda: next(now)) as progress:
        for done in (10, 55):
            progress(done)
            progress.print(f"line {done}")
    assert capsys.readouterr() == ("line 10\nline 55\n", "55 images, 11 s, 5.0 images/s\n")


def test_terminal_shows_a_bar() -> None:
    """Lines are printed above it."""
    code = HEAD + (
        "from prep.console.progress import Progress\n"
        "def work():\n"
        "    with Progress(3, 'image') as progress:\n"
        "        for done in (1, 2, 3):\n"
        "            progress.print(f'scores of {done}')\n"
        "            progress.note(f'note on {done}')\n"
        "            progress(done)\n"
        "UnixCommand('x', callback=work).main([])"
    )
    terminal, ours = os.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    subprocess.run([sys.executable, "-c", code], stdout=ours, stderr=ours, timeout=120, check=True, env=ENVIRONMENT)
    os.close(ours)
    seen = b""
    with suppress(OSError):  # the other end is closed
        while data := os.read(terminal, 1 << 16):
            seen += data
    os.close(terminal)
    for line in (f"{what} {done}" for what in ("scores of", "note on") for done in (1, 2, 3)):
        assert re.search(rf"[\r\n]{line}\r\n".encode(), seen), seen
    assert b"3/3" in seen
    assert b" s left" not in seen
