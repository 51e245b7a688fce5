"""`prep bench`: it measures any dataset, and its advice follows from the results."""

import errno
import json
import os
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import loader.pixels.shards
import prep.bench.measure
from loader.errors import FormatError
from loader.format.index import read_index
from loader.format.layout import PAGE
from prep.bench.measure import short_of_memory
from prep.bench.report import Measurements, Workload, recommendation, report_lines, shell_word
from prep.cli import main

LOCAL = Measurements(
    file_system="ext4",
    network=False,
    dataset_bytes=8 * 10**9,
    free_memory=4 * 10**9,
    latency_ms=0.1,
    random_mb_per_second=500.0,
    evicted=1.0,
    cold={"mmap": 3e3, "pread": 2e3},
    warm={"mmap": 2e4, "pread": 5e3},
    needed=640.0,
)
WORKLOAD = Workload(scale=4, lr_patch=64, batch_size=64, step_ms=100.0, threads=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, 'No change needed: io="auto" (mmap here)'),
        ({"network": True}, 'No change needed: io="auto" (pread here)'),
        ({"cold": {"mmap": 700.0, "pread": 2e3}}, 'Use io="pread"'),
        ({"cold": {"mmap": 2e3, "pread": 700.0}, "network": True}, 'Use io="mmap"'),
        ({"cold": {"mmap": 50.0, "pread": 100.0}}, 'too slow for this training, and memory is too small'),
        ({"cold": {"mmap": 50.0, "pread": 100.0}}, 'cp -r -- some/where "${TMPDIR:?}"/    # about 0.3 minutes'),
        ({"cold": {"mmap": 50.0, "pread": 100.0}, "free_memory": 20 * 10**9}, "The first epoch will wait"),
        ({"warm": {"mmap": 600.0, "pread": 500.0}}, "Even from memory"),
    ],
)  # fmt: skip
def test_recommendation(change: dict[str, object], message: str) -> None:
    assert message in recommendation(replace(LOCAL, **change), Path("some/where"))  # type: ignore[arg-type]


def test_report_mentions_pages_that_stay_cached() -> None:
    text = "\n".join(report_lines(replace(LOCAL, evicted=0.25), WORKLOAD, Path("d")))
    assert "75% of the pages stayed in memory" in text
    assert "counts as local disk" in text
    assert "stayed" not in "\n".join(report_lines(LOCAL, WORKLOAD, Path("d")))


def test_measure(dataset: Path) -> None:
    arguments = ["bench", str(dataset), "--lr-patch", "8", "--batch-size", "4", "--seconds", "0.7"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["needed"] == 40
    assert facts["latency_ms"] > 0
    assert facts["random_mb_per_second"] > 0
    for rates in (facts["cold"], facts["warm"]):
        assert set(rates) == {"mmap", "pread"}
        assert min(rates.values()) > 0
    assert facts["advice"]
    result = CliRunner().invoke(main, arguments)
    assert "training needs      40 patches/s" in result.output


def test_usage_errors(dataset: Path, tmp_path: Path) -> None:
    for arguments in ([str(tmp_path)], [str(dataset), "--scale", "8"], [str(dataset), "--lr-patch", "300"]):
        result = CliRunner().invoke(main, ["bench", *arguments])
        assert result.exit_code == 1
        assert "expected" in result.output
    result = CliRunner().invoke(main, ["bench", str(dataset), "--step-ms", "0"])
    assert result.exit_code == 2


def bench(dataset: Path, *words: object) -> Result:
    arguments = ["bench", str(dataset), "--lr-patch", "8", "--batch-size", "4", "--seconds", "0.5"]
    result = CliRunner().invoke(main, [*arguments, *map(str, words)])
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result


@pytest.mark.parametrize("error", [FormatError("x: expected a file that can be mapped, got No such device"),
                                   MemoryError()])  # fmt: skip
def test_files_that_cannot_be_mapped(dataset: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """As on FUSE with direct_io, or under `ulimit -v`: positional reads are still measured."""

    def no_map(*_: object) -> None:
        raise error

    monkeypatch.setattr(loader.pixels.shards, "_map_file", no_map)
    facts = json.loads(bench(dataset, "--json").output)
    assert set(facts["cold"]) == set(facts["warm"]) == {"pread"}
    assert facts["not_measured"]["mmap"]
    assert facts["advice"].startswith('Use io="pread": io="auto" is "mmap" here, which was not measured (')
    assert "io='mmap' was not measured: " in bench(dataset).output


def test_not_enough_memory(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positional reads hold tiles in memory; what does not fit is not tried, since Linux would kill the process."""
    index = read_index(dataset)
    assert short_of_memory(index, WORKLOAD, "mmap", 1 << 27) is None
    assert short_of_memory(index, WORKLOAD, "pread", 1 << 27)
    assert short_of_memory(index, WORKLOAD, "pread", 1 << 31) is None
    monkeypatch.setattr(prep.bench.measure, "available_memory", lambda: 2_000_000)
    assert set(json.loads(bench(dataset, "--json").output)["not_measured"]) == {"pread"}
    monkeypatch.setattr(prep.bench.measure, "available_memory", lambda: 1000)
    result = bench(dataset)
    assert result.exit_code == 1
    assert result.output.count("a smaller --batch-size needs less") == 2


def test_failing_storage_is_a_one_line_error(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread

    def fail(descriptor: int, size: int, offset: int) -> bytes:
        if size != PAGE:  # reading the index
            return real(descriptor, size, offset)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    result = bench(dataset)
    assert result.exit_code == 1
    assert result.output == f"Error: {dataset}: expected readable storage, got Input/output error\n"


@pytest.mark.parametrize("name", ["urban x4 ü", "it's", "-r", "$(touch owned)", "a\x1b[2J\nb", "~", "*", "\udce4"])
def test_copy_command_can_be_pasted(tmp_path: Path, name: str) -> None:
    slow = replace(LOCAL, cold={"mmap": 50.0, "pread": 100.0})
    data, target = tmp_path / name, tmp_path / "target"
    data.mkdir()
    target.mkdir()
    command = recommendation(slow, Path(name)).splitlines()[-1]
    assert command.isprintable()
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
    run = partial(subprocess.run, ["bash", "-c", command], cwd=tmp_path, capture_output=True, timeout=60)
    assert run(env=environment | {"TMPDIR": str(target)}).returncode == 0
    assert [path.name for path in target.iterdir()] == [name]
    ended = run(env=environment)
    assert ended.returncode != 0
    assert "TMPDIR" in str(ended.stderr)


def test_working_directory_is_copied_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shell_word(Path()) == str(tmp_path)
    assert shell_word(Path("..")) == str(tmp_path.parent)


def test_scale_zero_is_refused(dataset: Path) -> None:
    assert bench(dataset, "--scale", 0).exit_code == 2
