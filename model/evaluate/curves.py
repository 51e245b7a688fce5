"""Curves of training runs, from their `metrics.jsonl`: `python -m model.curves RUN...`, or `write_curves` for one.

They show loss and PSNR-Y over iterations, with bicubic's PSNR-Y as a dashed line. Drawing needs matplotlib
(`pip install 'srshards[plots]'`), which is imported only when used; its settings are not changed.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loader.errors import ShardsError, one_line
from loader.system.safefile import read_named, write_atomically
from model.run_log import LOG, VALID, iteration_in, number_in, read_records
from prep.console.paths import GivenPath
from prep.console.unix import UnixCommand

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = (".png", ".pdf", ".svg")
Points = Mapping[int, float]


@dataclass(frozen=True)
class Curves:
    """A run's training loss and validation PSNR-Y in dB by iteration, and bicubic's PSNR-Y if known."""

    loss: Points
    psnr: Points
    bicubic: float | None


def read_curves(log: Path) -> Curves:
    """Return the curves of a run's log.

    Only scores on the dataset validated last are returned. If an iteration occurs twice, as after a resume, the later
    record counts. Lines left incomplete by a killed run are skipped.

    Raises:
        LogError: the file has no records, or a value is not a number.
        OSError: the file cannot be read.
    """
    loss: dict[int, float] = {}
    scores: dict[str, dict[int, float]] = {}  # by dataset
    bicubic: dict[str, float] = {}
    valid = ""
    for line, record in read_records(log, read_named):
        where = f"{log}: line {line}"
        if "psnr_y" in record or "bicubic_psnr_y" in record:
            valid = str(record.get(VALID))[:64]
        if (score := number_in(record, "bicubic_psnr_y", where)) is not None:
            bicubic[valid] = score
        for key, points in (("loss", loss), ("psnr_y", scores.setdefault(valid, {}))):
            if (value := number_in(record, key, where)) is not None:
                points[iteration_in(record, where)] = value
    return Curves(dict(sorted(loss.items())), dict(sorted(scores.get(valid, {}).items())), bicubic.get(valid))


def write_curves(log: Path, path: Path) -> bool:
    """Draw the curves of one run and write them to `path`, atomically; return False if matplotlib is not installed.

    Raises LogError and OSError as `read_curves` does, and OSError if the file cannot be written.
    """
    if not can_draw():
        return False
    write_atomically(path, draw({"network": read_curves(log)}, path.suffix.removeprefix(".") or "png"))
    return True


def can_draw() -> bool:
    """Return True if matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(runs: Mapping[str, Curves], kind: str) -> bytes:
    """Draw the curves of runs, by label, and return the bytes of a file of that kind ("png", "pdf" or "svg")."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for number, (label, curves) in enumerate(runs.items()):
        colour = f"C{number}"
        plot_curve(left, curves.loss, label, colour)
        plot_curve(right, curves.psnr, label, colour)
    baselines = {label: curves.bicubic for label, curves in runs.items() if _finite(curves.bicubic)}
    if len(set(baselines.values())) == 1:
        right.axhline(next(iter(baselines.values())), color="0.4", linestyle="--", label="bicubic")
    else:
        for number, label in enumerate(runs):
            if label in baselines:
                right.axhline(baselines[label], color=f"C{number}", linestyle="--", label=f"bicubic, {label}")
    left.set(title="Training loss", ylabel="loss")
    if any(value > 0 and math.isfinite(value) for curves in runs.values() for value in curves.loss.values()):
        left.set_yscale("log")
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_formatter("{x:g}")
    right.set(title="Validation PSNR on Y", ylabel="dB")
    for axis, several in ((left, len(runs) > 1), (right, True)):
        finish_axis(axis, several)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=110)
    return buffer.getvalue()


def plot_curve(axis: Axes, points: Points, label: str, colour: str) -> None:
    """Draw one curve, with markers if it has few points and gaps at non-finite values."""
    if points:
        values = [value if math.isfinite(value) else math.nan for value in points.values()]
        marker = "." if len(points) <= 30 else ""
        axis.plot(list(points), values, color=colour, label=label, marker=marker, linewidth=1.5)


def finish_axis(axis: Axes, legend: bool) -> None:
    """Add grid, legend and x label to an axis, or a note if it has no curves."""
    axis.set_xlabel("iteration")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if not axis.lines:
        axis.text(0.5, 0.5, "no data yet", transform=axis.transAxes, ha="center", va="center", color="0.5")
    elif legend:
        axis.legend(frameon=False)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _labels(runs: tuple[Path, ...]) -> list[str]:
    """Return the runs' folder names, or their paths as given if two names are equal."""
    names = [(run.parent if run.is_file() else run).resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


@click.command(cls=UnixCommand)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=GivenPath())
@click.option(
    "--out", type=GivenPath(), default=Path("curves.png"), show_default=True, help="Output file: PNG, PDF or SVG."
)
def main(runs: tuple[Path, ...], out: Path) -> None:
    """Draw the curves of training runs in one picture. RUN is a run's folder or its metrics.jsonl."""
    if out.suffix.lower() not in KINDS:
        raise click.UsageError(one_line(f"--out {out}: expected a file name ending in one of {', '.join(KINDS)}"))
    if not can_draw():
        raise click.ClickException("curves need matplotlib: pip install 'srshards[plots]'")
    try:
        logs = [run / LOG if run.is_dir() else run for run in runs]
        if out.resolve() in {log.resolve() for log in logs}:
            raise ShardsError(f"{out}: expected an output file that is not an input")
        curves = [read_curves(log) for log in logs]
        labels = [label.replace("$", r"\$") for label in map(one_line, _labels(runs))]
        data = draw(dict(zip(labels, curves, strict=True)), out.suffix.lower().removeprefix("."))
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, data)
    except ShardsError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(one_line(f"{error.filename}: {error.strerror}")) from error
    click.echo(one_line(f"{out}: {', '.join(_labels(runs))}"))
