"""Test helpers: images, recipes, plans, datasets, digests."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from prep.build.build import build_dataset
from prep.images.find import find_images
from prep.plan.dataset import DatasetPlan, plan_dataset
from prep.plan.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
Pixels = NDArray[np.uint8]


# Names and sizes (H, W) of a small folder of images: whole tiles, partial tiles, multiples of no scale.
SIZES = {"a": (128, 192), "b": (131, 97), "c": (64, 64), "d e": (65, 300), "ü": (200, 71)}


def photograph(height: int, width: int, seed: int = 0) -> Pixels:
    """Return an image (H, W, 3) with smooth areas, edges and noise, so that every crop is different."""
    rng = np.random.default_rng([seed, height, width])
    coarse = rng.integers(0, 256, (height // 9 + 2, width // 9 + 2, 3), np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    noise = rng.integers(-20, 21, (height, width, 3))
    pixels: Pixels = np.clip(smooth + noise, 0, 255).astype(np.uint8)
    return pixels


def write_image(path: Path, rgb: Pixels) -> None:
    """Write RGB pixels to an image file of the type given by its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done, data = cv2.imencode(path.suffix, rgb[..., ::-1])
    assert done
    path.write_bytes(data.tobytes())


def make_recipe(**changes: object) -> Recipe:
    """Return the default recipe with changes."""
    options: dict[str, object] = {
        "scales": (2, 4),
        "container": "hdf5",
        "tile": 64,
        "images_per_shard": 2,
        "resize": "matlab-uint8",
        "border": "symmetric",
    }
    return Recipe(**(options | changes))  # type: ignore[arg-type]


def make_plan(source: Path, out: Path, *, lr: Path | None = None, **changes: object) -> DatasetPlan:
    """Return the plan of a dataset of a folder of images, with changes to the default recipe."""
    return plan_dataset(find_images([source]), make_recipe(**({"given_lr": lr is not None} | changes)), out, lr)


Build = Callable[..., Path]


def build(
    source: Path,
    out: Path,
    *,
    lr: Path | None = None,
    workers: int = 1,
    skip_bad: bool = False,
    overwrite: bool = False,
    report: Callable[[int], None] = lambda done: None,
    note: Callable[[str], None] = lambda text: None,
    **changes: object,
) -> Path:
    """Build a dataset of a folder of images, with changes to the default recipe; return its folder."""
    plan = make_plan(source, out, lr=lr, **changes)
    build_dataset(plan, workers, skip_bad=skip_bad, overwrite=overwrite, report=report, note=note)
    return out


def write_sidecar(path: Path, index: str, data: bytes) -> bytes:
    """Write a sidecar that belongs to the index of that digest; return the bytes of the file."""
    header = json.dumps({"format": "srshards-scores", "version": 1, "index": index}).encode()
    text = header.ljust(4095) + b"\n" + data
    path.write_bytes(text)
    return text


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
