"""PSNR and SSIM of a network, or of bicubic enlargement, on a folder of images: `python -m model.evaluate`.

Images are uint8 arrays (H, W, 3), RGB. HR images whose size is no multiple of the scale are cropped at the
bottom and right, as everyone does; LR images are read, or made by MATLAB's bicubic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal

import click
import numpy as np
import torch
from torch import nn

from loader import ImageDataset
from loader.format import SCALES, ShardsError
from model.checkpoints import CheckpointError, load_checkpoint
from model.metrics import Image, Scores, mean_scores, score
from prep.images import check_sizes, find_images, pair_lr, read_image
from prep.imresize import enlarge, imresize

Upscaler = Callable[[Image], Image]


@dataclass(frozen=True)
class Pair:
    """One test image: `hr` is uint8 (H·scale, W·scale, 3), `lr` uint8 (H, W, 3)."""

    name: str
    lr: Image
    hr: Image


def bicubic_upscaler(scale: int) -> Upscaler:
    """Enlarge by MATLAB's bicubic."""
    return lambda lr: enlarge(lr, scale)


def network_upscaler(network: nn.Module, device: torch.device) -> Upscaler:
    """Enlarge by `network`, which must be on `device`; its output is clamped and rounded to uint8."""

    def upscale(lr: Image) -> Image:
        pixels = torch.from_numpy(np.ascontiguousarray(lr)).to(device)
        training = network.training
        network.eval()
        with torch.inference_mode():
            sr = network(pixels.permute(2, 0, 1).unsqueeze(0).float() / 255)
            rounded = sr[0].float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
        network.train(training)
        return np.ascontiguousarray(rounded.cpu().numpy())

    return upscale


def score_pairs(upscale: Upscaler, pairs: Iterable[Pair], border: int) -> Iterator[tuple[str, Scores]]:
    """Enlarge each LR image and compare it with HR, leaving out `border` pixels along every edge.

    Raises ShardsError, naming the image, where it is too small or an upscaler's result has another size.
    """
    for pair in pairs:
        try:
            yield pair.name, score(upscale(pair.lr), pair.hr, border)
        except ValueError as error:
            raise ShardsError(f"image {pair.name}: {error}") from error


def read_pairs(hr: Path, lr: Path | None, scale: int) -> Iterator[Pair]:
    """Read the images of folder `hr`, with LR from folder `lr` or made from HR by `imresize`.

    LR images are found by stem, and may be HR's size rounded up, as for `prep build-shards --lr`. Raises
    ShardsError for a folder without images, an image that cannot be read, and, listing them all before any image
    is given, LR images that are missing or have a wrong size.
    """
    images = find_images([hr])
    given = None
    if lr is not None:
        given = pair_lr(images, lr, scale)
        check_sizes(images, given, scale)
    for number, image in enumerate(images):
        pixels = read_image(image.path)
        height, width = (size // scale for size in pixels.shape[:2])
        if min(height, width) == 0:
            raise ShardsError(f"{image.path}: expected at least {scale} x {scale} pixels, got {pixels.shape[:2]}")
        pixels = pixels[: height * scale, : width * scale]
        small = imresize(pixels, scale) if given is None else read_image(given[number].path)
        yield Pair(image.stem, small[:height, :width], pixels)


def shard_pairs(images: ImageDataset) -> Iterator[Pair]:
    """Give the whole images of a dataset of shards."""
    for number, name in enumerate(images.names):
        lr, hr = (np.ascontiguousarray(side.permute(1, 2, 0).numpy()) for side in images[number])
        yield Pair(name, lr, hr)


def pick_device(name: str) -> torch.device:
    """Give the device called `name`, "auto" being CUDA where there is one; click.BadParameter for another."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise click.BadParameter(f"cannot use {name!r}: {reason}", param_hint="'--device'") from error
    return device


def _network_from(path: Path, scale: int, prefer: Literal["ema", "raw"], device: torch.device) -> Upscaler:
    """Load the network of a checkpoint, say on stdout what it is, and make an upscaler of it."""
    checkpoint = load_checkpoint(path, prefer)
    config = checkpoint.config
    if config.scale != scale:
        raise CheckpointError(f"{path}: expected a network for --scale {scale}, got one for {config.scale}")
    network = checkpoint.build().to(device)
    click.echo(
        f"checkpoint {path}: weights {checkpoint.weights_key}, {network.parameter_count()} parameters, "
        f"{config.features} features, kernel {config.kernel_size}, {config.blocks} blocks, on {device}"
    )
    return network_upscaler(network, device)


@click.command()
@click.option("--hr", type=click.Path(path_type=Path), required=True, help="Folder of HR images.")
@click.option("--lr", type=click.Path(path_type=Path), help="Folder of LR images.  [default: made from HR]")
@click.option("--scale", type=int, required=True, help="2, 3, 4 or 8.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights to evaluate.")
@click.option("--bicubic", is_flag=True, help="Evaluate MATLAB's bicubic enlargement instead.")
@click.option(
    "--weights",
    type=click.Choice(["ema", "raw"]),
    default="ema",
    show_default=True,
    help="Which weights to take from a checkpoint that holds both.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
def main(
    hr: Path,
    lr: Path | None,
    scale: int,
    checkpoint: Path | None,
    bicubic: bool,
    weights: Literal["ema", "raw"],
    device: str,
) -> None:
    """PSNR and SSIM in RGB and on MATLAB's Y, per image and on average; the border left out is the scale."""
    if bicubic == (checkpoint is not None):
        raise click.UsageError("give either --checkpoint FILE or --bicubic")
    if scale not in SCALES:
        raise click.BadParameter(f"expected one of {SCALES}, got {scale}", param_hint="'--scale'")
    try:
        if checkpoint is not None:
            upscale = _network_from(checkpoint, scale, weights, pick_device(device))
        else:
            upscale = bicubic_upscaler(scale)
            click.echo("bicubic enlargement, MATLAB's")
        click.echo(f"LR {'made from HR by MATLAB bicubic' if lr is None else f'from {lr}'}, scale {scale}")
        click.echo(f"border cropped before measuring: {scale} pixels on each side")
        click.echo("image PSNR-RGB SSIM-RGB PSNR-Y SSIM-Y")
        collected = []
        for name, scores in score_pairs(upscale, read_pairs(hr, lr, scale), border=scale):
            collected.append(scores)
            _print_row(name, scores)
        _print_row("mean", mean_scores(collected))
    except (ShardsError, CheckpointError) as error:
        raise click.ClickException(str(error)) from error


def _print_row(name: str, scores: Scores) -> None:
    click.echo(" ".join([name, *(f"{value:.4f}" for value in astuple(scores))]))


if __name__ == "__main__":
    main()
