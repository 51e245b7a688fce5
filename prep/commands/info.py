"""The `info` command."""

import json
from pathlib import Path

import click

from prep.console.paths import GivenPath


@click.command()
@click.argument("folder", metavar="[DIR]", required=False, type=GivenPath())
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--system", is_flag=True, help="Tell of this machine, and which kernels are in use, instead.")
def info(folder: Path | None, as_json: bool, system: bool) -> None:
    """Print what is in the dataset at DIR."""
    if (folder is None) != system:
        raise click.UsageError("expected either DIR or --system")
    from prep.info import dataset_lines, describe_dataset, describe_system, system_lines

    facts = describe_system() if folder is None else describe_dataset(folder)
    lines = [json.dumps(facts, indent=1)] if as_json else (system_lines if folder is None else dataset_lines)(facts)
    click.echo("\n".join(lines))
