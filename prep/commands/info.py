"""The `info` command."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import click

from loader.errors import one_line
from loader.format.index import read_index
from loader.format.index_text import describe_lr
from loader.format.layout import plane_name
from loader.native import SWITCH, compiled
from prep import __version__
from prep.console.paths import GivenPath

KERNELS = {"downscaling": "loader.resize._imresize", "gather": "loader.pixels._gather", "network": "model.cpu._mixing"}
MAX_NAMED = 20  # skipped images that are listed
PACKAGES = ("numpy", "h5py", "opencv-python-headless", "pillow", "torch", "click", "tqdm")


@click.command()
@click.argument("folder", metavar="[DIR]", required=False, type=GivenPath())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--system", is_flag=True, help="Describe this machine and the compiled kernels in use instead.")
def info(folder: Path | None, as_json: bool, system: bool) -> None:
    """Describe the dataset at DIR."""
    if (folder is None) != system:
        raise click.UsageError("expected either DIR or --system")
    facts = describe_system() if folder is None else describe_dataset(folder)
    lines = [json.dumps(facts, indent=1)] if as_json else (system_lines if folder is None else dataset_lines)(facts)
    click.echo("\n".join(lines))


def describe_dataset(folder: Path) -> dict[str, Any]:
    """Return the facts of a dataset, ready for JSON.

    Raises:
        FormatError: the folder holds no complete dataset, or its list of skipped images is damaged.
    """
    from prep.workspace.workspace import Workspace

    index = read_index(folder)
    pixels = {plane_name(scale): int((h * w).sum()) for scale in index.planes for h, w in [index.sizes(scale)]}
    return {
        "folder": str(folder),
        "container": index.container,
        "made_by": index.made_by,
        "libraries": dict(index.libraries),
        "images": len(index.name),
        "scales": list(index.scales),
        "lr": describe_lr(index.lr),
        "images_per_shard": index.images_per_shard,
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "smallest": [int(index.height.min()), int(index.width.min())],
        "largest": [int(index.height.max()), int(index.width.max())],
        "planes": {
            plane_name(scale): {"tile": plane.tile, "pixels": pixels[plane_name(scale)]}
            for scale, plane in index.planes.items()
        },
        "first": index.name[0],
        "last": index.name[-1],
        "left_out": [vars(image) for image in Workspace(folder).read_skipped()],
        "sha256": index.sha256,
    }


def dataset_lines(facts: dict[str, Any]) -> list[str]:
    """Return the facts of a dataset as text."""
    lr = facts["lr"]
    origin = f"made by imresize ({lr['resize']}, {lr['border']} border)" if "resize" in lr else lr["made"]
    planes = [
        f"{name:<10}{plane['pixels'] / 1e6:.1f} megapixels, tiles of {plane['tile']}"
        for name, plane in facts["planes"].items()
    ]
    lines = [
        f"{facts['folder']}: {facts['images']} images, {facts['first']} to {facts['last']}",
        f"{'sizes':<10}{' × '.join(map(str, facts['smallest']))} to {' × '.join(map(str, facts['largest']))}, "
        "smallest and largest height × width",
        *planes,
        f"{'LR':<10}{origin}",
        f"{'shards':<10}{facts['shards']} {facts['container']}, {facts['bytes'] / 1e6:.1f} MB",
        f"{'made by':<10}{', '.join([facts['made_by'], *map(' '.join, facts['libraries'].items())])}",
        f"{'index':<10}sha256 {facts['sha256']}",
    ]
    if skipped := facts["left_out"]:
        lines.append(f"{'skipped':<10}{len(skipped)} images (build-shards --retry-skipped tries them again):")
        lines += [f"  {bad['source']}: {bad['reason']}" for bad in skipped[:MAX_NAMED]]
        if len(skipped) > MAX_NAMED:
            lines.append(f"  … and {len(skipped) - MAX_NAMED} more, see skipped.json")
    return [one_line(line) for line in lines]


def describe_system() -> dict[str, Any]:
    """Return versions, processor cores, and which kernels are compiled."""
    off = os.environ.get(SWITCH) == "0"
    fallback = f"fallback ({SWITCH}=0)" if off else "fallback (not built, or built from other sources)"
    return {
        "srshards": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "kernels": {use: "compiled" if compiled(name) else fallback for use, name in KERNELS.items()},
        "packages": {name: _version(name) for name in PACKAGES},
    }


def system_lines(facts: dict[str, Any]) -> list[str]:
    """Return the facts of the system as text."""
    flat = {**facts, **facts["kernels"], **facts["packages"]}
    return [f"{name:<24}{value}" for name, value in flat.items() if not isinstance(value, dict)]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
