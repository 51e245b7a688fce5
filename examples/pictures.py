"""Make docs/pictures/comparison.png, the picture of README.md: train on sample photographs, enlarge one held aside.

`python examples/pictures.py` takes about ten minutes. Photographs, shards and the run stay in demo/pictures/ in the
checkout. Each step is a command that you could type; it is printed before it runs.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import click
from demo import command
from PIL import Image

from prep.images.sample import sample_photographs

SCALE = 2
HELD_ASIDE = ("motorcycle_left", "motorcycle_right")  # one scene, seen from two positions
TRAINING = {
    "--scale": SCALE,
    "--model": "tiny",
    "--iterations": 2000,
    "--batch-size": 16,
    "--lr-patch": 32,
    "--learning-rate": 1e-3,
    "--schedule": "cosine",
    "--validate-every": 500,
    "--log-every": 100,
}

WORK = Path("demo") / "pictures"
TRAIN, VALID, RUN = WORK / "photographs" / "train", WORK / "photographs" / "valid", WORK / "run"
SHEET = WORK / "sheet.png"
PICTURE = Path("docs") / "pictures" / "comparison.png"


@click.command()
def main() -> None:
    """Make docs/pictures/comparison.png: train, enlarge, draw, and store a small PNG."""
    started = time.perf_counter()
    os.chdir(Path(__file__).resolve().parent.parent)
    shutil.rmtree(WORK, ignore_errors=True)
    for path in sample_photographs():
        folder = VALID if path.stem in HELD_ASIDE else TRAIN
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.name)
    shards = WORK / "shards"
    for photographs in (TRAIN, VALID):
        out = shards / photographs.name
        command("-m", "prep.cli", "build-shards", photographs, "--scale", str(SCALE), "--out", out)
    flags = {"--shards": shards / TRAIN.name, "--valid-shards": shards / VALID.name, "--out": RUN} | TRAINING
    command("train.py", *(str(word) for flag in flags.items() for word in flag))
    checkpoint = RUN / "checkpoints" / "last.pt"
    sheet = ("--sheet", SHEET, "--sheet-rows", "1")
    command("-m", "model.evaluate", "--hr", VALID, "--scale", str(SCALE), "--checkpoint", checkpoint, *sheet)
    Image.open(SHEET).save(PICTURE, optimize=True)
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{PICTURE}: {PICTURE.stat().st_size / 1e3:.0f} kB, after {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
