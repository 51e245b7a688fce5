"""The main job on photographs that scikit-image ships: shards, a short training, an evaluation, pictures.

`python examples/demo.py` (or `make demo`) writes everything under demo/ in the checkout; what was there is replaced.
Each step is a command that you could type; it is printed before it runs.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch

from model.checkpoints import load_checkpoint
from model.metrics import Image, luma, score
from model.pairs import Pair, read_pairs
from model.upscalers import Upscaler, bicubic_upscaler, network_upscaler
from prep.sample import sample_photographs

matplotlib.use("Agg")  # draws without a display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

SCALE = 2
ITERATIONS = 1000
BATCH_SIZE = 8
LR_PATCH = 48
VALIDATE_EVERY = 100
CROP = 96  # side of the region that a sheet shows, in HR pixels

DEMO = Path("demo")
TRAIN, VALID = DEMO / "photographs" / "train", DEMO / "photographs" / "valid"
RUN = DEMO / "run"
CHECKPOINT = RUN / "checkpoints" / "last.pt"

HELD_ASIDE = ("chelsea", "coffee")


@dataclass(frozen=True)
class Panel:
    """One picture of a sheet: a uint8 (H, W, 3) image, its name, and what stands under it."""

    image: Image
    name: str
    note: str


def command(*arguments: str | Path, capture: bool = False) -> str:
    """Show and run `python ARGUMENTS` in the checkout; give its output if captured. Ends the demo if it fails."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, *words], check=False, text=True, stdout=subprocess.PIPE if capture else None)
    if capture:
        print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"demo: the command above failed with exit code {done.returncode}")
    return done.stdout or ""


def copy_photographs() -> None:
    """Copy scikit-image's colour photographs, those to train on apart from those held aside."""
    for path in sample_photographs():
        folder = VALID if path.stem in HELD_ASIDE else TRAIN
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.name)
    for folder in (TRAIN, VALID):
        print(f"{folder}: {', '.join(sorted(path.stem for path in folder.iterdir()))}")


def build_and_train() -> None:
    """Turn the photographs into shards, and train on them."""
    for photographs, shards in ((TRAIN, "train"), (VALID, "valid")):
        out = DEMO / "shards" / shards
        command("-m", "prep.cli", "build-shards", photographs, "--scale", str(SCALE), "--out", out, "--overwrite")
    options = {
        "--shards": DEMO / "shards" / "train",
        "--valid-shards": DEMO / "shards" / "valid",
        "--scale": SCALE,
        "--model": "tiny",
        "--iterations": ITERATIONS,
        "--batch-size": BATCH_SIZE,
        "--lr-patch": LR_PATCH,
        "--validate-every": VALIDATE_EVERY,
        "--log-every": VALIDATE_EVERY // 2,
        "--out": RUN,
    }
    command("train.py", *(str(word) for option in options.items() for word in option))


def evaluate(*what: str | Path) -> float:
    """Run the evaluation on the photographs held aside, and give its mean PSNR on Y in dB."""
    output = command("-m", "model.evaluate", "--hr", VALID, "--scale", str(SCALE), *what, capture=True)
    return float(output.splitlines()[-1].split()[3])


def hardest_region(bicubic: Image, hr: Image) -> tuple[int, int]:
    """Top and left of the CROP x CROP region where bicubic errs most: there is something to see there."""
    error = np.square(luma(bicubic) - luma(hr))
    means = cv2.boxFilter(error, cv2.CV_64F, (CROP, CROP), anchor=(0, 0))[: -CROP + 1, : -CROP + 1]
    top, left = np.unravel_index(int(np.argmax(means)), means.shape)
    return int(top), int(left)


def draw_sheet(pair: Pair, network: Upscaler, path: Path) -> None:
    """Draw one photograph, and a region of it as LR, by bicubic, by the network, and as it was."""
    bicubic, learned = bicubic_upscaler(SCALE)(pair.lr), network(pair.lr)
    top, left = hardest_region(bicubic, pair.hr)
    region = np.s_[top : top + CROP, left : left + CROP]

    def note(image: Image) -> str:
        scores = score(image, pair.hr, border=SCALE)
        return f"PSNR-Y {scores.psnr_y:.2f} dB\nSSIM-Y {scores.ssim_y:.4f}"

    nearest = pair.lr.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    panels = [
        Panel(nearest[region], "LR, pixels enlarged", note(nearest)),
        Panel(bicubic[region], "bicubic", note(bicubic)),
        Panel(learned[region], f"tiny, {ITERATIONS} iterations", note(learned)),
        Panel(pair.hr[region], "HR, the original", ""),
    ]
    figure, axes = plt.subplots(1, 5, figsize=(18, 4.6), width_ratios=[1.4, 1, 1, 1, 1], layout="constrained")
    axes[0].imshow(pair.hr)
    axes[0].add_patch(Rectangle((left, top), CROP, CROP, fill=False, edgecolor="red", linewidth=2))
    label(axes[0], pair.name, "scores are of the whole photograph")
    for axis, panel in zip(axes[1:], panels, strict=True):
        axis.imshow(panel.image, interpolation="nearest")
        label(axis, panel.name, panel.note)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def label(axis: Axes, title: str, note: str) -> None:
    """Write above and below a picture, in place of its axes' ticks."""
    axis.set(title=title, xlabel=note, xticks=[], yticks=[])
    axis.title.set_fontsize(13)
    axis.xaxis.label.set_fontsize(12)


def draw_curves(bicubic_psnr: float, path: Path) -> None:
    """Draw the training loss and the validation PSNR against iterations, from the run's log."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in (RUN / "metrics.jsonl").open(encoding="utf-8")]
    figure, (loss, psnr) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axis, key, title in (
        (loss, "loss", "training loss"),
        (psnr, "psnr_y", "PSNR-Y, photographs held aside"),
    ):
        points = [(line["iteration"], line[key]) for line in lines if key in line]
        axis.plot(
            *zip(*points, strict=True),
            marker=".",
            label="tiny (averaged weights)" if axis is psnr else "loss",
        )
        axis.set(title=title, xlabel="iteration")
        axis.grid(alpha=0.3)
    loss.set(ylabel="L1 + 0.1 FFT", yscale="log")
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter("{x:g}")
    psnr.set(ylabel="dB")
    psnr.axhline(bicubic_psnr, color="grey", linestyle="--", label="bicubic")
    psnr.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run the whole demo."""
    started = time.perf_counter()
    os.chdir(Path(__file__).resolve().parent.parent)
    for old in (TRAIN, VALID, RUN):
        shutil.rmtree(old, ignore_errors=True)
    copy_photographs()
    build_and_train()
    bicubic_psnr = evaluate("--bicubic")
    network_psnr = evaluate("--checkpoint", CHECKPOINT)

    network = network_upscaler(load_checkpoint(CHECKPOINT).build(), torch.device("cpu"))
    sheets = []
    for pair in read_pairs(VALID, None, SCALE):
        sheets.append(DEMO / f"{pair.name}.png")
        draw_sheet(pair, network, sheets[-1])
    draw_curves(bicubic_psnr, DEMO / "curves.png")

    winner = "the network" if network_psnr > bicubic_psnr else "bicubic"
    print(f"\nDone in {time.perf_counter() - started:.0f} seconds. Look at:")
    print(f"  pictures    {', '.join(map(str, sheets))}")
    print(f"  curves      {DEMO / 'curves.png'}")
    print(f"  checkpoint  {CHECKPOINT}")
    print(f"Mean PSNR-Y on the {len(sheets)} photographs held aside, x{SCALE}, {ITERATIONS} iterations:")
    print(f"  bicubic {bicubic_psnr:.4f} dB, network {network_psnr:.4f} dB: {winner} wins")


if __name__ == "__main__":
    main()
