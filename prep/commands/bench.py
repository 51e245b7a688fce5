"""The `bench` command."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from prep.console.paths import GivenPath


@click.command()
@click.argument("folder", metavar="DIR", type=GivenPath())
@click.option("--scale", type=click.IntRange(min=1), help="[default: the largest in the dataset]")
@click.option("--lr-patch", type=click.IntRange(min=1), default=64, help="Patch size in LR pixels.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, help="Samples per step.")
@click.option(
    "--step-ms", type=click.FloatRange(min=0, min_open=True), default=100.0, help="Duration of a training step."
)
@click.option("--threads", type=click.IntRange(min=1), default=2, help="Threads that gather batches.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=30.0, help="Duration of the benchmark.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(
    folder: Path,
    scale: int | None,
    lr_patch: int,
    batch_size: int,
    step_ms: float,
    threads: int,
    seconds: float,
    as_json: bool,
) -> None:
    """Measure whether the storage of the dataset at DIR keeps up with training."""
    from loader.errors import ShardsError
    from loader.format.index import read_index
    from prep.bench.measure import measure
    from prep.bench.report import Workload, recommendation, report_lines

    if not (scales := read_index(folder).scales):
        raise ShardsError(f"{folder}: expected a dataset with LR, whose crops bench reads, got HR alone")
    workload = Workload(
        scale=max(scales) if scale is None else scale,
        lr_patch=lr_patch,
        batch_size=batch_size,
        step_ms=step_ms,
        threads=threads,
    )
    measured = measure(folder, workload, seconds)
    if as_json:
        click.echo(json.dumps(asdict(measured) | {"advice": recommendation(measured, folder)}, indent=1))
    else:
        click.echo("\n".join(report_lines(measured, workload, folder)))
