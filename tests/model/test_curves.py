"""Curves: reading logs, including those of killed runs, and drawing them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers import ROOT

from model.evaluate import curves
from model.evaluate.curves import Curves, draw, main, read_curves, write_curves
from model.run_log import LogError


def write_log(path: Path, *records: Any, tail: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


RECORDS = (
    {"iteration": 0, "bicubic_psnr_y": 28.42, "bicubic_ssim_y": 0.81},
    {"iteration": 100, "loss": 0.5, "l1": 0.4},
    {"iteration": 200, "loss": 0.25},
    {"iteration": 200, "psnr_rgb": 26.0, "ssim_rgb": 0.7, "psnr_y": 28.0, "ssim_y": 0.8},
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return image


def test_log_is_read(tmp_path: Path) -> None:
    log = write_log(tmp_path / "metrics.jsonl", *RECORDS)
    assert read_curves(log) == Curves({100: 0.5, 200: 0.25}, {200: 28.0}, 28.42)


def test_scores_of_the_last_dataset_are_drawn(tmp_path: Path) -> None:
    def scored(valid: str, bicubic: float, *psnr: tuple[int, float]) -> list[dict[str, Any]]:
        first = {"iteration": 0, "bicubic_psnr_y": bicubic, "valid": valid}
        return [first, *({"iteration": i, "psnr_y": value, "valid": valid} for i, value in psnr)]

    a, b = scored("aa", 28.0, (100, 29.0), (200, 30.0)), scored("bb", 20.0, (300, 21.0))
    assert read_curves(write_log(tmp_path / "b.jsonl", *a, *b)) == Curves({}, {300: 21.0}, 20.0)
    again = {"iteration": 400, "psnr_y": 31.0, "valid": "aa"}
    log = write_log(tmp_path / "a.jsonl", *a, *b, again)
    assert read_curves(log) == Curves({}, {100: 29.0, 200: 30.0, 400: 31.0}, 28.0)


def test_incomplete_lines_of_killed_runs_are_skipped(tmp_path: Path) -> None:
    log = write_log(tmp_path / "metrics.jsonl", *RECORDS, tail='{"iteration": 300, "loss": 0.')
    assert read_curves(log) == Curves({100: 0.5, 200: 0.25}, {200: 28.0}, 28.42)
    with log.open("a") as file:  # a resumed run appended to it
        file.write(
            '{"iteration": 300, "loss": 0.2}\n{"iteration": 200, "loss": 0.3}\n{"iteration": 400, "loss": 0.1}\n'
        )
    assert read_curves(log).loss == {100: 0.5, 200: 0.3, 400: 0.1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no log\n", "metrics.jsonl: expected lines of JSON objects, got none"),
        ('{"iteration": 1, "loss": "x"}\n', "line 1: loss: expected a number, got 'x'"),
        ('{"loss": 1.0}\n', "line 1: iteration: expected a whole number, got None"),
        ('{"iteration": true, "psnr_y": 1}\n', "line 1: iteration: expected a whole number, got True"),
    ],
)
def test_invalid_logs_are_refused(text: str, message: str, tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text(text)
    with pytest.raises(LogError, match=message):
        read_curves(log)
    result = run(log, "--out", tmp_path / "curves.png")
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("kept", [RECORDS, RECORDS[:1], RECORDS[1:2], ()], ids=["all", "bicubic", "one loss", "none"])
def test_curves_are_written_atomically(kept: tuple[Any, ...], tmp_path: Path) -> None:
    log = write_log(tmp_path / "metrics.jsonl", *kept)
    assert write_curves(log, tmp_path / "curves.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]
    assert pixels((tmp_path / "curves.png").read_bytes()).min() < 100


def test_non_finite_values_leave_gaps(tmp_path: Path) -> None:
    losses = [1.0, float("nan"), float("inf"), 0.5, -1.0]
    write_log(tmp_path / "metrics.jsonl", *({"iteration": i, "loss": loss} for i, loss in enumerate(losses)))
    assert write_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    write_log(tmp_path / "metrics.jsonl", {"iteration": 1, "loss": float("nan")}, {"bicubic_psnr_y": float("inf")})
    assert write_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")


def test_every_part_is_drawn() -> None:
    """Each curve and bicubic's line change only their own half of the picture."""
    loss, psnr = {1: 1.0, 2: 0.5, 3: 0.4}, {1: 20.0, 2: 25.0, 3: 26.0}
    whole = pixels(draw({"a": Curves(loss, psnr, 24.0)}, "png"))
    middle = whole.shape[1] // 2
    for changed, side in (
        (Curves({**loss, 2: 0.8}, psnr, 24.0), 0),
        (Curves(loss, {**psnr, 2: 22.0}, 24.0), 1),
        (Curves(loss, psnr, 23.0), 1),
        (Curves(loss, psnr, None), 1),
    ):
        other = pixels(draw({"a": changed}, "png"))
        assert other.shape == whole.shape
        assert (other[:, :middle] != whole[:, :middle]).any() == (side == 0)
        assert (other[:, middle:] != whole[:, middle:]).any() == (side == 1)


def test_without_matplotlib_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = write_log(tmp_path / "metrics.jsonl", *RECORDS)
    monkeypatch.setattr(curves, "can_draw", lambda: False)
    assert not write_curves(log, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
    result = run(log, "--out", tmp_path / "curves.png")
    assert result.exit_code == 1
    assert "pip install 'srshards[plots]'" in result.stderr


def test_drawing_does_not_change_matplotlibs_settings(tmp_path: Path) -> None:
    log = write_log(tmp_path / "metrics.jsonl", *RECORDS)
    code = (
        "import sys; from pathlib import Path; from model.evaluate.curves import write_curves\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"write_curves(Path({str(log)!r}), Path({str(tmp_path / 'curves.png')!r}))\n"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    root = ROOT
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=root)


@pytest.mark.parametrize("suffix", ["png", "PDF", "svg"])
def test_several_runs_in_one_picture(suffix: str, tmp_path: Path) -> None:
    write_log(tmp_path / "one" / "metrics.jsonl", *RECORDS)
    write_log(tmp_path / "two" / "metrics.jsonl", *RECORDS[1:], {"bicubic_psnr_y": 30.0})
    out = tmp_path / "new" / f"all.{suffix}"
    result = run(tmp_path / "one", tmp_path / "two" / "metrics.jsonl", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}: one, two\n"
    assert out.stat().st_size > 5000


def test_runs_of_equal_names_are_labelled_by_path(tmp_path: Path) -> None:
    runs = [tmp_path / place / "run" for place in ("a", "b")]
    for place in runs:
        write_log(place / "metrics.jsonl", *RECORDS)
    result = run(*runs, "--out", tmp_path / "all.png")
    assert result.stdout == f"{tmp_path / 'all.png'}: {runs[0]}, {runs[1]}\n"


def test_errors_are_one_line(tmp_path: Path) -> None:
    log = write_log(tmp_path / "metrics.jsonl", *RECORDS)
    for arguments, code, message in (
        ([], 2, "Missing argument"),
        ([log, "--out", tmp_path / "curves.txt"], 2, "expected a file name ending in one of .png, .pdf, .svg"),
        ([tmp_path / "absent"], 1, "absent: No such file"),
        ([log, "--out", log / "curves.png"], 1, "metrics.jsonl: File exists"),
    ):
        result = run(*arguments)
        assert result.exit_code == code
        assert message in result.stderr
        assert "Traceback" not in result.output
