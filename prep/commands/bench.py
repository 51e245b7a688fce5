"""The `bench` command."""

import json
from pathlib import Path

import click

from prep.console.paths import GivenPath


@click.command()
@click.argument("folder", metavar="DIR", type=GivenPath())
@click.option("--scale", type=click.IntRange(min=1), help="[default: the largest in the dataset]")
@click.option("--lr-patch", type=click.IntRange(min=1), default=64, help="In LR pixels.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64)
@click.option("--step-ms", type=click.FloatRange(min=0, min_open=True), default=100.0, help="How long a step takes.")
@click.option("--threads", type=click.IntRange(min=1), default=2, help="That gather batches.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=30.0, help="How long to measure.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
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
    """Will the storage of the dataset at DIR keep up with training?"""
    from loader.errors import ShardsError
    from loader.format.index import read_index
    from prep.bench.advice import Need, advice, report_lines
    from prep.bench.measure import measure

    if not (scales := read_index(folder).scales):
        raise ShardsError(f"{folder}: expected a dataset with LR, whose crops bench reads, got HR alone")
    need = Need(max(scales) if scale is None else scale, lr_patch, batch_size, step_ms, threads)
    report = measure(folder, need, seconds)
    if as_json:
        click.echo(json.dumps(vars(report) | {"advice": advice(report, folder)}, indent=1))
    else:
        click.echo("\n".join(report_lines(report, need, folder)))
