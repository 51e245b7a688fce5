"""Ablation of ShuffleMixer and its FFT loss: train without each part in turn, and tabulate the scores.

`python examples/ablate.py --shards DIR --valid-shards DIR --scale 2 --iterations N --out OUT` runs train.py once per
variant, one after another, with the same seed and samples; flags after `--` go to every run. OUT receives `table.md`,
`ablation.png` (with matplotlib) and a folder per variant. Running the same command again resumes, and skips variants
that are complete.
"""

from __future__ import annotations

import io
import json
import math
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from loader.system.safefile import write_atomically
from model.evaluate.curves import can_draw, finish_axis, plot_curve
from model.run_log import BICUBIC, LOG, VALID, read_log, score_of
from model.shufflemixer import ShuffleMixer, ShuffleMixerConfig
from model.training import settings_io

TRAINER = Path(__file__).resolve().parent.parent / "train.py"
KERNEL_SIZES = (3, 5, 7)
SCORES = ("psnr_y", "ssim_y", "psnr_rgb")
HEADER = (
    "| variant | what differs | parameters | GMACs | PSNR-Y | SSIM-Y | PSNR-RGB | PSNR-Y − full | s/step |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|--:|"
)


@dataclass(frozen=True)
class Variant:
    """A change of one part of the full network or loss, as flags of train.py."""

    name: str
    differs: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """The result of a variant's run: PSNR-Y by iteration, and the final scores if it is complete."""

    variant: Variant
    parameters: int
    multiply_accumulates: int
    curve: dict[int, float]
    scores: dict[str, float] | None
    bicubic: dict[str, float] | None
    seconds_per_step: float | None  # the median over the log's intervals
    failure: str | None


def variants(kernel_size: int) -> list[Variant]:
    """Return the full network with that kernel size, then one variant per claim of the paper."""
    others = [size for size in KERNEL_SIZES if size != kernel_size]
    return [
        Variant("full", "nothing"),
        *(Variant(f"kernel-{k}", f"{k}x{k} depth-wise convolutions", ("--kernel-size", str(k))) for k in others),
        Variant("no-shuffle", "no channel shuffle", ("--no-shuffle",)),
        Variant("no-split", "point-wise MLPs on all channels instead of half", ("--no-split",)),
        Variant("no-fused", "no fused 3x3 convolutions", ("--no-fused",)),
        Variant("no-norm", "no layer norms", ("--no-norm",)),
        Variant("no-fft", "no FFT loss", ("--fft-weight", "0")),
    ]


def choose(available: Sequence[Variant], names: str | None) -> list[Variant]:
    """Return the variants in a comma-separated list, all if it is None. click.BadParameter for unknown names."""
    if names is None:
        return list(available)
    wanted = list(dict.fromkeys(names.split(",")))
    if unknown := [name for name in wanted if name not in {variant.name for variant in available}]:
        known = ", ".join(variant.name for variant in available)
        raise click.BadParameter(
            f"expected one or more of {known}, got {', '.join(unknown)}", param_hint="'--variants'"
        )
    return [variant for variant in available if variant.name in wanted]


def network_of(flags: Sequence[str]) -> ShuffleMixerConfig:
    """Return the network that train.py trains with these flags. click.UsageError for flags it would refuse."""

    @settings_io.setting_options
    def build(**values: Any) -> ShuffleMixerConfig:
        return settings_io.resolve(settings_io.given_settings(click.get_current_context(), values), {}, {}).network

    lenient = {"ignore_unknown_options": True, "allow_extra_args": True}  # flags that are not settings
    command = click.command("train.py", context_settings=lenient)(build)
    network: ShuffleMixerConfig = command.main(list(flags), standalone_mode=False)
    return network


def summarise(
    variant: Variant, network: ShuffleMixer, log: Iterable[dict[str, Any]], iterations: int, failure: str | None = None
) -> Result:
    """Return the result of a variant from its log's records; final scores must be of exactly this iteration."""
    entries = list(log)
    validated = [entry for entry in entries if "psnr_y" in entry]
    last = validated[-1] if validated and validated[-1]["iteration"] == iterations and not failure else None
    baselines = [entry for entry in entries if BICUBIC + "psnr_y" in entry]
    same = [entry for entry in baselines if validated and entry.get(VALID) == validated[-1].get(VALID)]
    baseline = next(iter(same or baselines), None)  # bicubic's, preferably on the same images
    steps = [entry["seconds_per_step"] for entry in entries if "seconds_per_step" in entry]
    return Result(
        variant=variant,
        parameters=network.parameter_count(),
        multiply_accumulates=network.multiply_accumulates(),
        curve={entry["iteration"]: score_of(entry["psnr_y"]) for entry in validated},
        scores={name: score_of(last[name]) for name in SCORES} if last else None,
        bicubic={name: score_of(baseline[BICUBIC + name]) for name in SCORES} if baseline else None,
        seconds_per_step=statistics.median(steps) if steps else None,
        failure=failure,
    )


def bicubic_of(results: Sequence[Result]) -> dict[str, float] | None:
    """Return the scores of bicubic enlargement, which are the same for all variants."""
    return next((result.bicubic for result in results if result.bicubic), None)


def table(title: str, results: Sequence[Result]) -> str:
    """Return the results as a Markdown table."""
    full = next((result.scores for result in results if result.variant.name == "full"), None)
    rows = []
    for result in results:
        scores = ["–"] * 4
        if result.scores:
            psnr_y, ssim_y, psnr_rgb = (result.scores[name] for name in SCORES)
            difference = (
                "–" if full is None or not math.isfinite(psnr_y - full["psnr_y"]) else f"{psnr_y - full['psnr_y']:+.3f}"
            )
            scores = [f"{psnr_y:.3f}", f"{ssim_y:.4f}", f"{psnr_rgb:.3f}", difference]
        step = "–" if result.seconds_per_step is None else f"{result.seconds_per_step:.4f}"
        differs = result.variant.differs + (f" ({result.failure})" if result.failure else "")
        size = [f"{result.parameters:,}", f"{result.multiply_accumulates / 1e9:.2f}"]
        rows.append("| " + " | ".join([result.variant.name, differs, *size, *scores, step]) + " |")
    if bicubic := bicubic_of(results):
        psnr_y, ssim_y, psnr_rgb = (bicubic[name] for name in SCORES)
        rows.append(f"| bicubic | no network | – | – | {psnr_y:.3f} | {ssim_y:.4f} | {psnr_rgb:.3f} | – | – |")
    notes = (
        "GMACs are for 1280 x 720 HR pixels. Scores are means over the validation set, with the EMA weights.\n"
        "s/step is the median over the log's intervals. With one seed each, small differences may be chance."
    )
    return "\n".join([f"# {title}", "", HEADER, *rows, "", notes, ""])


def draw(title: str, results: Sequence[Result]) -> bytes:
    """Plot PSNR-Y over iterations, a line per variant, and return the bytes of a PNG. Requires matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for number, result in enumerate(results):
        plot_curve(axis, result.curve, result.variant.name, f"C{number}")
    if (bicubic := bicubic_of(results)) and math.isfinite(bicubic["psnr_y"]):
        axis.axhline(bicubic["psnr_y"], color="0.4", linestyle="--", label="bicubic")
    axis.set(title=title, ylabel="PSNR-Y in dB, validation")
    finish_axis(axis, legend=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


class CommandRunner:
    """Runs commands one at a time, and forwards stop signals to the running one, which then saves."""

    def __init__(self) -> None:
        self.stopped = False
        self.child: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.stop)

    def stop(self, *_: object) -> None:
        """Stop the running command, and start no other."""
        self.stopped = True
        if self.child is not None:
            self.child.send_signal(signal.SIGTERM)

    def __call__(self, command: Sequence[str]) -> int:
        """Print and run a command, and return its exit code."""
        click.echo(f"\n$ {shlex.join(command)}")
        self.child = subprocess.Popen(command)
        if self.stopped:  # a signal arrived meanwhile
            self.stop()
        code = self.child.wait()
        self.child = None
        return code


def train_variant(out: Path, flags: Sequence[str], iterations: int, run: Callable[[Sequence[str]], int]) -> str | None:
    """Train a variant unless it is complete; return a message if it failed or stopped."""
    last = max((entry["iteration"] for entry in read_log(out / LOG)), default=0)
    if last > iterations:
        return f"failed: {out}: expected at most {iterations} iterations, got {last}"
    finished = out / "finished"
    if finished.exists() and last == iterations:
        return None
    code = run([sys.executable, str(TRAINER), *flags, "--out", str(out), "--resume", "auto"])
    if code:
        return f"failed with exit code {code}"
    return None if finished.exists() else "stopped early"


def record_flags(out: Path, common: Sequence[str]) -> None:
    """Record these flags in the folder `out`. click.ClickException if it has runs with other flags."""
    record = out / "flags.json"
    if record.exists() and (found := json.loads(record.read_text(encoding="utf-8"))) != list(common):
        text = f"{out}: expected runs with {shlex.join(common)}, got {shlex.join(map(str, found))}; use another --out"
        raise click.ClickException(text)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(record, (json.dumps(list(common)) + "\n").encode())


@click.command(context_settings={"show_default": True})
@click.option("--shards", required=True, help="Training dataset.")
@click.option("--valid-shards", required=True, help="Validation dataset.")
@click.option("--scale", required=True, type=int, help="Upscaling factor: 2, 3 or 4.")
@click.option("--iterations", required=True, type=click.IntRange(min=1), help="Iterations per variant.")
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Output folder.")
@click.option("--variants", "names", help="Comma-separated variants; default: all.")
@click.option("--seed", default=0, help="Seed of the initial weights and of the samples.")
@click.argument("further", nargs=-1, type=click.UNPROCESSED)
def main(
    shards: str, valid_shards: str, scale: int, iterations: int, out: Path, names: str | None, seed: int,
    further: tuple[str, ...],
) -> None:  # fmt: skip
    """Train ShuffleMixer without each of its parts in turn. FURTHER flags for train.py follow a `--`."""
    ours = ["--shards", shards, "--valid-shards", valid_shards, "--scale", str(scale), "--seed", str(seed)]
    common = [*further, *ours]
    length = ["--iterations", str(iterations)]
    network = network_of([*common, *length, "--out", str(out)])
    chosen = choose(variants(network.kernel_size), names)
    networks = [
        ShuffleMixer.from_config(network_of([*common, *length, "--out", str(out), *variant.flags]))
        for variant in chosen
    ]
    record_flags(out, common)
    title = f"Ablation at x{scale} after {iterations:,} iterations (seed {seed})"
    command = f"\nEach: `train.py {shlex.join([*common, *length])}` plus the variant's own flags.\n"
    failures: dict[str, str] = {}

    def report() -> list[Result]:
        results = [
            summarise(each, net, read_log(out / each.name / LOG), iterations, failures.get(each.name))
            for each, net in zip(chosen, networks, strict=True)
        ]
        write_atomically(out / "table.md", (table(title, results) + command).encode())
        return results

    run = CommandRunner()
    results = report()
    for variant in chosen:
        failure = train_variant(out / variant.name, [*common, *length, *variant.flags], iterations, run)
        if failure:
            failures[variant.name] = failure
            click.echo(f"{variant.name}: {failure}", err=True)
        results = report()  # after each run, so that a long job shows intermediate results
        if run.stopped:
            break
    click.echo("\n" + table(title, results))
    if can_draw():
        write_atomically(out / "ablation.png", draw(title, results))
    else:
        click.echo("ablation.png needs matplotlib: pip install 'srshards[plots]'", err=True)
    if run.stopped:
        raise click.ClickException("stopped; run the same command again to resume")
    if failures:
        raise click.ClickException(f"{len(failures)} of {len(chosen)} variants failed: {', '.join(failures)}")


if __name__ == "__main__":
    main()
