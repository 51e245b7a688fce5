"""The whole workflow on scikit-image's sample photographs: shards, a short training, evaluation, a sheet of pictures.

`python examples/demo.py` (or `make demo`) writes to demo/ in the checkout, replacing earlier results. Each step is a
command you could type; it is printed before it runs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from prep.images.sample import sample_photographs

SCALE = 2
ITERATIONS = 1000
BATCH_SIZE = 8
LR_PATCH = 48
VALIDATE_EVERY = 100

DEMO = Path("demo")
TRAIN, VALID = DEMO / "photographs" / "train", DEMO / "photographs" / "valid"
RUN = DEMO / "run"
CHECKPOINT = RUN / "checkpoints" / "last.pt"
SHEET = DEMO / "sheet.png"

HELD_OUT = ("chelsea", "coffee")


def command(*arguments: str | Path, capture: bool = False) -> str:
    """Print and run `python ARGUMENTS`; return its output if captured. Exit if it fails."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, *words], check=False, text=True, stdout=subprocess.PIPE if capture else None)
    if capture:
        print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"demo: the command above failed with exit code {done.returncode}")
    return done.stdout or ""


def copy_photographs() -> None:
    """Copy scikit-image's colour photographs into a training and a validation folder."""
    for path in sample_photographs():
        folder = VALID if path.stem in HELD_OUT else TRAIN
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.name)
    for folder in (TRAIN, VALID):
        print(f"{folder}: {', '.join(sorted(path.stem for path in folder.iterdir()))}")


def build_and_train() -> None:
    """Build shards from the photographs and train on them."""
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


def evaluate(*upscaler: str | Path) -> float:
    """Evaluate on the held-out photographs; return the mean PSNR on Y in dB."""
    output = command("-m", "model.evaluate", "--hr", VALID, "--scale", str(SCALE), *upscaler, capture=True)
    return float(output.splitlines()[-1].split()[3])


def main() -> None:
    """Run the whole demo."""
    started = time.perf_counter()
    os.chdir(Path(__file__).resolve().parent.parent)
    for old in (TRAIN, VALID, RUN):
        shutil.rmtree(old, ignore_errors=True)
    copy_photographs()
    build_and_train()
    bicubic_psnr = evaluate("--bicubic")
    network_psnr = evaluate("--checkpoint", CHECKPOINT, "--sheet", SHEET)

    winner = "the network" if network_psnr > bicubic_psnr else "bicubic"
    print(f"\nDone in {time.perf_counter() - started:.0f} seconds. Results:")
    print(f"  pictures    {SHEET}")
    print(f"  curves      {RUN / 'curves.png'}")
    print(f"  checkpoint  {CHECKPOINT}")
    print(f"Mean PSNR-Y on the {len(HELD_OUT)} held-out photographs, x{SCALE}, {ITERATIONS} iterations:")
    print(f"  bicubic {bicubic_psnr:.4f} dB, network {network_psnr:.4f} dB: {winner} wins")


if __name__ == "__main__":
    main()
