"""`prep bench`: it measures something on any dataset, and its advice follows from what it measured."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from prep.advice import Need, Report, advice, report_lines
from prep.cli import main

LOCAL = Report("ext4", False, 8 * 10**9, 4 * 10**9, 0.1, 500.0, 1.0, {"mmap": 3e3, "pread": 2e3},
               {"mmap": 2e4, "pread": 5e3}, 640.0)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, 'Fine as it is: io="auto" (mmap here)'),
        ({"network": True}, 'Fine as it is: io="auto" (pread here)'),
        ({"cold": {"mmap": 700.0, "pread": 2e3}}, 'Use io="pread"'),
        ({"cold": {"mmap": 2e3, "pread": 700.0}, "network": True}, 'Use io="mmap"'),
        ({"cold": {"mmap": 50.0, "pread": 100.0}}, 'too slow for this training, and memory too small'),
        ({"cold": {"mmap": 50.0, "pread": 100.0}}, 'cp -r -- some/where "${TMPDIR:?}"/    # about 0.3 minutes'),
        ({"cold": {"mmap": 50.0, "pread": 100.0}, "free_memory": 20 * 10**9}, "The first epoch will wait"),
        ({"warm": {"mmap": 600.0, "pread": 500.0}}, "Even from memory"),
    ],
)  # fmt: skip
def test_advice(change: dict[str, object], message: str) -> None:
    assert message in advice(replace(LOCAL, **change), Path("some/where"))  # type: ignore[arg-type]


def test_pages_that_stay_are_told() -> None:
    need = Need(4, 64, 64, 100.0, 2)
    text = "\n".join(report_lines(replace(LOCAL, forgotten=0.25), need, Path("d")))
    assert "75% of the pages stayed in memory" in text
    assert "counts as local disk" in text
    assert "stayed" not in "\n".join(report_lines(LOCAL, need, Path("d")))


def test_measuring(dataset: Path) -> None:
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
    assert "training takes      40 patches/s" in result.output


def test_wrong_use(dataset: Path, tmp_path: Path) -> None:
    for arguments in ([str(tmp_path)], [str(dataset), "--scale", "8"], [str(dataset), "--lr-patch", "300"]):
        result = CliRunner().invoke(main, ["bench", *arguments])
        assert result.exit_code == 1
        assert "expected" in result.output
    result = CliRunner().invoke(main, ["bench", str(dataset), "--step-ms", "0"])
    assert result.exit_code == 2
