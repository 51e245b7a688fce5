"""The ablation: table and plot from made-up logs, runs of a stub train.py, and a real one."""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from helpers import ROOT

from model.shufflemixer import ShuffleMixer, ShuffleMixerConfig

SCRIPT = ROOT / "examples" / "ablate.py"
# Records its flags and validates once; fails or hangs for certain variants.
STUB = """
import json, os, pathlib, signal, sys, time
flags = sys.argv[1:]
value = lambda name: flags[len(flags) - 1 - flags[::-1].index(name) + 1]
out = pathlib.Path(value("--out"))
out.mkdir(parents=True, exist_ok=True)
with (out.parent / "calls").open("a") as file:
    print(out.name, *flags, file=file)
if "--no-shuffle" in flags:
    sys.exit(3)
if "--no-norm" in flags:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    (out.parent / "waiting").touch()
    time.sleep(600)
number = int(value("--iterations"))
scores = {"psnr_rgb": 30.0, "ssim_rgb": 0.9, "psnr_y": 31.0 - ("--no-fused" in flags), "ssim_y": 0.91}
with (out / "metrics.jsonl").open("w") as file:
    print(json.dumps({"iteration": number, "loss": 1.0, "seconds_per_step": 0.5}), file=file)
    print(json.dumps({"iteration": number, **scores}), file=file)
(out / "finished").touch()
"""


def load() -> Any:
    spec = importlib.util.spec_from_file_location("ablate", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablate"] = module  # dataclasses resolve annotations here
    spec.loader.exec_module(module)
    return module


ablate = load()
FULL, KERNEL_5, KERNEL_7, NO_SHUFFLE, NO_SPLIT, NO_FUSED, NO_NORM, NO_FFT = ablate.variants(3)


@pytest.fixture
def stub_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the ablation run a stub train.py; return the folder for its --out."""
    path = tmp_path / "train.py"
    path.write_text(STUB)
    monkeypatch.setattr(ablate, "TRAINER", path)
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def _own_signals() -> Any:
    """Restore signal handlers after an ablation in this process."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def invoke(out: Path, *words: str | int | Path) -> Result:
    common = ["--shards", "s", "--valid-shards", "v", "--scale", 2, "--iterations", 4, "--out", out]
    return CliRunner().invoke(ablate.main, [str(word) for word in [*common, *words]])


def calls(out: Path) -> list[list[str]]:
    return [line.split() for line in (out / "calls").read_text().splitlines()]


def network(**changes: Any) -> ShuffleMixer:
    return ShuffleMixer.from_config(ShuffleMixerConfig.preset("tiny", 2, **changes))


def log(*psnr: float) -> list[dict[str, Any]]:
    """Return training and validation records, every 10 iterations."""
    entries: list[dict[str, Any]] = []
    for number, value in enumerate(psnr, 1):
        entries.append({"iteration": 10 * number, "loss": 0.1, "seconds_per_step": number / 10})
        entries.append({"iteration": 10 * number, "psnr_y": value, "ssim_y": 0.95, "psnr_rgb": value - 2})
    return entries


def test_one_variant_per_claim() -> None:
    names = ["full", "kernel-5", "kernel-7", "no-shuffle", "no-split", "no-fused", "no-norm", "no-fft"]
    assert [variant.name for variant in ablate.variants(3)] == names
    assert [variant.name for variant in ablate.variants(7)][:3] == ["full", "kernel-3", "kernel-5"]


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        (FULL, {}),
        (KERNEL_5, {"kernel_size": 5}),
        (KERNEL_7, {"kernel_size": 7}),
        (NO_SHUFFLE, {"shuffle": False}),
        (NO_SPLIT, {"split": False}),
        (NO_FUSED, {"fused": False}),
        (NO_NORM, {"norm": False}),
        (NO_FFT, {}),
    ],
)
def test_variant_flags_change_the_network(variant: Any, changes: dict[str, Any]) -> None:
    flags = ["--shards", "s", "--out", "o", "--scale", "2", "--model", "base", *variant.flags]
    assert ablate.network_of(flags) == ShuffleMixerConfig.preset("base", 2, **changes)


def test_table_shows_final_scores_and_differences() -> None:
    results = [
        ablate.summarise(FULL, network(), log(30.0, 33.125, 34.5), 30),
        ablate.summarise(NO_FUSED, network(fused=False), log(30.0, 32.0, 33.25), 30),
        ablate.summarise(NO_NORM, network(norm=False), log(30.0), 30),
        ablate.summarise(NO_FFT, network(), [], 30, failure="failed with exit code 1"),
    ]
    lines = ablate.table("A title", results).splitlines()
    assert lines[0] == "# A title"
    small = network(fused=False)
    sizes = f"{small.parameter_count():,} | {small.multiply_accumulates() / 1e9:.2f}"
    assert lines[4:8] == [
        "| full | nothing | 108,435 | 25.03 | 34.500 | 0.9500 | 32.500 | +0.000 | 0.2000 |",
        f"| no-fused | no fused 3x3 convolutions | {sizes} | 33.250 | 0.9500 | 31.250 | -1.250 | 0.2000 |",
        f"| no-norm | no layer norms | {network(norm=False).parameter_count():,} | 25.03 | – | – | – | – | 0.1000 |",
        "| no-fft | no FFT loss (failed with exit code 1) | 108,435 | 25.03 | – | – | – | – | – |",
    ]
    assert {line.count("|") for line in lines[2:8]} == {10}


def test_no_difference_without_the_full_network() -> None:
    text = ablate.table("A title", [ablate.summarise(NO_FFT, network(), log(30.0), 10)])
    assert "| 30.000 | 0.9500 | 28.000 | – | 0.1000 |" in text


def test_bicubic_is_the_last_row() -> None:
    bicubic = {"bicubic_psnr_y": 25.5, "bicubic_ssim_y": 0.8, "bicubic_psnr_rgb": 24.25}
    entries = [{"iteration": 10, **bicubic}, *log(30.0)]
    results = [ablate.summarise(NO_FFT, network(), log(30.0), 10), ablate.summarise(FULL, network(), entries, 10)]
    rows = [line for line in ablate.table("A title", results).splitlines() if line.startswith("| ")]
    assert rows[-1] == "| bicubic | no network | – | – | 25.500 | 0.8000 | 24.250 | – | – |"
    assert len(rows) == 4


def test_plot_has_a_line_per_validated_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn: list[Any] = []
    save = figure.savefig

    def kept(self: Any, *to: Any, **how: Any) -> None:
        drawn.append(self)
        save(self, *to, **how)

    monkeypatch.setattr(figure, "savefig", kept)
    bicubic = {"bicubic_psnr_y": 25.5, "bicubic_ssim_y": 0.8, "bicubic_psnr_rgb": 24.25}
    results = [
        ablate.summarise(FULL, network(), [{"iteration": 10, **bicubic}, *log(30.0, 31.0)], 20),
        ablate.summarise(NO_FFT, network(), log(29.0), 20),
        ablate.summarise(NO_NORM, network(), [], 20),
    ]
    assert ablate.draw("A title", results).startswith(b"\x89PNG")
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn[0].axes[0].get_lines()}
    assert lines == {"full": [[10, 30], [20, 31]], "no-fft": [[10, 29]], "bicubic": [[0, 25.5], [1, 25.5]]}


def test_without_matplotlib_only_the_table_is_written(stub_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablate, "can_draw", lambda: False)
    result = invoke(stub_out, "--variants", "full")
    assert result.exit_code == 0
    assert "ablation.png needs matplotlib: pip install 'srshards[plots]'\n" in result.stderr
    assert sorted(path.name for path in stub_out.iterdir()) == ["calls", "flags.json", "full", "table.md"]


def test_runs_differ_only_in_the_variants_flags(stub_out: Path) -> None:
    result = invoke(stub_out, "--variants", "no-fft,full,kernel-5", "--seed", 7, "--", "--batch-size", 2)
    assert result.exit_code == 0, result.output
    common = shlex.split("--batch-size 2 --shards s --valid-shards v --scale 2 --seed 7 --iterations 4")
    for call, variant in zip(calls(stub_out), (FULL, KERNEL_5, NO_FFT), strict=True):
        out = str(stub_out / variant.name)
        assert call == [variant.name, *common, *variant.flags, "--out", out, "--resume", "auto"]
    text = (stub_out / "table.md").read_text()
    assert text.startswith("# Ablation at x2 after 4 iterations (seed 7)")
    assert text.count("| 31.000 | 0.9100 | 30.000 | +0.000 | 0.5000 |") == 3
    assert text.endswith(f"\nEach: `train.py {shlex.join(common)}` plus the variant's own flags.\n")
    assert text.partition("\nEach:")[0] in result.stdout


def test_a_failure_is_reported_and_the_others_run(stub_out: Path) -> None:
    result = invoke(stub_out, "--variants", "full,no-shuffle,no-fused")
    assert result.exit_code == 1
    assert "no-shuffle: failed with exit code 3\n" in result.stderr
    assert "Error: 1 of 3 variants failed: no-shuffle\n" in result.stderr
    text = (stub_out / "table.md").read_text()
    assert "| no-shuffle | no channel shuffle (failed with exit code 3) |" in text
    assert "| 30.000 | 0.9100 | 30.000 | -1.000 | 0.5000 |" in text


def test_complete_variants_are_not_run_again(stub_out: Path) -> None:
    def run(*words: str | int) -> list[str]:
        (stub_out / "calls").unlink(missing_ok=True)
        result = invoke(stub_out, *words)
        assert result.exit_code == 0, result.output
        return [call[0] for call in calls(stub_out)] if (stub_out / "calls").exists() else []

    assert run("--variants", "full,no-fft") == ["full", "no-fft"]
    assert run("--variants", "full,no-fft,no-fused") == ["no-fused"]
    assert run("--variants", "full,no-fft") == []
    (stub_out / "full" / "finished").unlink()
    assert run("--variants", "full,no-fft") == ["full"]
    assert run("--variants", "full,no-fft", "--iterations", 8) == ["full", "no-fft"]
    result = invoke(stub_out, "--variants", "full")
    assert result.exit_code == 1
    assert f"{stub_out / 'full'}: expected at most 4 iterations, got 8" in result.stderr


def test_other_flags_in_the_same_folder_are_refused(stub_out: Path) -> None:
    assert invoke(stub_out, "--variants", "full").exit_code == 0
    result = invoke(stub_out, "--variants", "full", "--seed", 1)
    assert result.exit_code == 1
    assert "--seed 1, got --shards s --valid-shards v --scale 2 --seed 0; use another --out" in result.stderr
    assert len(calls(stub_out)) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--variants", "full,half"), "expected one or more of full, kernel-5,"),
        (("--", "--kernel-size", "4"), "kernel_size must be odd, got 4"),
        (("--", "--model", "huge"), "'huge' is not one of 'tiny', 'base'"),
        (("--iterations", 0), "0 is not in the range x>=1"),
    ],
)
def test_wrong_usage_writes_nothing(stub_out: Path, words: tuple[str | int, ...], message: str) -> None:
    result = invoke(stub_out, *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not stub_out.exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_the_running_variant(stub_out: Path, number: signal.Signals) -> None:
    code = (
        "import runpy, sys, pathlib\n"
        f"module = runpy.run_path({str(SCRIPT)!r})\n"
        f"module['train_variant'].__globals__['TRAINER'] = pathlib.Path({str(ablate.TRAINER)!r})\n"
        "module['main']()\n"
    )
    flags = ["--shards", "s", "--valid-shards", "v", "--scale", "2", "--iterations", "4", "--out", str(stub_out)]
    command = [sys.executable, "-c", code, *flags, "--variants", "full,no-norm,no-fft"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (stub_out / "waiting").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "no-norm: stopped early\n" in errors
    assert "stopped; run the same command again to resume" in errors
    assert [call[0] for call in calls(stub_out)] == ["full", "no-norm"]
    assert "| 31.000 |" in (stub_out / "table.md").read_text()


def test_real_runs(training_shards: Path, tmp_path: Path) -> None:
    shards, out = str(training_shards), tmp_path / "out"
    flags = ["--shards", shards, "--valid-shards", shards, "--scale", "2", "--iterations", "2", "--out", str(out)]
    small = ["--", "--batch-size", "1", "--lr-patch", "12", "--log-every", "1", "--device", "cpu", "--workers", "1"]
    result = CliRunner().invoke(ablate.main, [*flags, "--variants", "full,no-fused", *small])
    assert result.exit_code == 0, result.output
    rows = [line.split(" | ") for line in (out / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| variant", "| full", "| no-fused", "| bicubic"]
    logs = {name: list(ablate.read_log(out / name / "metrics.jsonl")) for name in ("full", "no-fused")}
    last = {name: [entry["psnr_y"] for entry in entries if "psnr_y" in entry][-1] for name, entries in logs.items()}
    (bicubic,) = [entry["bicubic_psnr_y"] for entry in logs["full"] if "bicubic_psnr_y" in entry]
    assert [row[4] for row in rows[1:]] == [f"{value:.3f}" for value in (last["full"], last["no-fused"], bicubic)]
    assert rows[2][7] == f"{last['no-fused'] - last['full']:+.3f}"
    assert all(float(row[8].removesuffix(" |")) > 0 for row in rows[1:3])
    assert (out / "ablation.png").exists() == ablate.can_draw()

    again = CliRunner().invoke(ablate.main, [*flags, "--variants", "full,no-fused", *small])
    assert again.exit_code == 0
    assert "$ " not in again.output  # no command is run


def test_infinite_scores_and_those_of_other_images() -> None:
    """The log writes infinity as null; bicubic's scores are taken from the dataset validated last."""

    def entry(valid: str, start: str, value: float | None) -> dict[str, Any]:
        scores = {f"{start}{name}": value for name in ("psnr_y", "ssim_y", "psnr_rgb")}
        return {"iteration": 10, "valid": valid, **scores}

    entries = [entry("old", "bicubic_", 20.0), entry("new", "bicubic_", 25.0), entry("new", "", None)]
    result = ablate.summarise(FULL, network(), entries, 10)
    assert result.bicubic["psnr_y"] == 25.0
    assert "| inf | inf | inf | – | – |" in ablate.table("A title", [result])
