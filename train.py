"""Train a super-resolution network from shards: `python train.py --shards DIR --scale 4 --out runs/x`.

The defaults are the published recipe of ShuffleMixer (Sun et al., NeurIPS 2022). Every sample is a pure function of
the seed and its number, so a run that is stopped and resumed (`--resume auto`) sees what an unbroken one sees.
OUT gets `metrics.jsonl`, and `checkpoints/last.pt`, which `python -m model.evaluate --checkpoint` reads.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import click
import torch
from torch import Tensor
from tqdm import tqdm

from loader import ImageDataset, PatchDataset, PatchLoader, ShardsError, to_float
from model.checkpoints import CheckpointError, infer_config, read_raw
from model.evaluate import network_upscaler, pick_device, score_pairs, shard_pairs
from model.losses import LossConfig, Losses, combined
from model.metrics import Scores, mean_scores
from model.shufflemixer import PRESETS, ShuffleMixer, ShuffleMixerConfig

ADAM_BETAS = (0.9, 0.99)
COUNTS = ("iterations", "batch_size", "lr_patch", "workers", "validate_every", "checkpoint_every", "log_every")
RANGES = {
    **dict.fromkeys(COUNTS, (1, math.inf)),
    **dict.fromkeys(("learning_rate", "fft_weight"), (0, math.inf)),
    **{"ema_decay": (0, 1), "seed": (0, 2**63)},
}


@dataclass(frozen=True)
class Config:
    """One run's settings, as the flags of the same names; kept in its checkpoints. ValueError for bad values."""

    shards: str
    scale: int
    out: str
    model: str = "tiny"
    iterations: int = 300_000
    batch_size: int = 64
    lr_patch: int = 64
    learning_rate: float = 5e-4
    fft_weight: float = 0.1
    ema_decay: float = 0.999
    workers: int = 2
    seed: int = 0
    device: str = "auto"
    valid_shards: str | None = None
    validate_every: int = 5000
    checkpoint_every: int = 5000
    log_every: int = 100
    skip_small: bool = False
    resume: str | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) < high:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be at least {low} and below {high}, got {getattr(self, name)}")
        ShuffleMixerConfig.preset(self.model, self.scale)


def open_patches(config: Config) -> PatchDataset:
    """Open the shards to train on; ShardsError if they are not whole, lack the scale, or are too small."""
    small: Literal["error", "skip"] = "skip" if config.skip_small else "error"
    try:
        return PatchDataset(config.shards, config.scale, config.lr_patch, seed=config.seed, too_small=small)
    except ShardsError as error:  # name the flag, not the argument
        raise ShardsError(str(error).replace('too_small="skip"', "--skip-small")) from error


@dataclass
class State:
    """Everything that training changes: what a checkpoint must hold for a run to continue as if never stopped."""

    network: ShuffleMixer
    ema: ShuffleMixer
    optimiser: torch.optim.Adam
    iteration: int = 0
    sample: int = 0  # the global number of the next sample


def new_state(config: Config, device: torch.device) -> State:
    """Start a network with weights drawn from the seed."""
    torch.manual_seed(config.seed)
    network = ShuffleMixer.preset(config.model, config.scale).to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.Adam(network.parameters(), lr=config.learning_rate, betas=ADAM_BETAS)
    return State(network, copy.deepcopy(network).requires_grad_(False), optimiser)


def train_step(state: State, batch: tuple[Tensor, Tensor], config: Config) -> Losses:
    """Learn from one float batch: descend, then let the average of the weights follow."""
    lr, hr = batch
    losses = combined(state.network(lr), hr, LossConfig(config.fft_weight))
    state.optimiser.zero_grad()
    torch.autograd.backward(losses.total)
    state.optimiser.step()
    state.iteration += 1
    state.sample += len(lr)
    # Warmed up: a plain average with decay 0.999 would still be mostly the random start after 1000 steps.
    decay = min(config.ema_decay, (1 + state.iteration) / (10 + state.iteration))
    with torch.no_grad():
        torch._foreach_lerp_(list(state.ema.parameters()), list(state.network.parameters()), 1 - decay)
    return losses


def save_checkpoint(path: Path, state: State, config: Config) -> None:
    """Write everything to a temporary file, then rename it: a kill leaves the old checkpoint or the new one."""

    def plain(network: ShuffleMixer) -> dict[str, Tensor]:
        return {name: value.cpu().contiguous() for name, value in network.state_dict().items()}

    content = {
        "params": plain(state.network),
        "params_ema": plain(state.ema),
        "iteration": state.iteration,
        "sample": state.sample,
        "optimiser": state.optimiser.state_dict(),
        "config": asdict(config),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def restore(path: Path, state: State, config: Config) -> None:
    """Continue from a checkpoint that `save_checkpoint` wrote; CheckpointError if it does not fit the run."""
    content = read_raw(path)
    try:
        if (found := infer_config(content["params"])) != state.network.config:
            raise ValueError(f"weights of {found}")
        state.network.load_state_dict(content["params"])
        state.ema.load_state_dict(content["params_ema"])
        state.optimiser.load_state_dict(content["optimiser"])
        state.iteration, state.sample = int(content["iteration"]), int(content["sample"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected a checkpoint of train.py with {state.network.config}; missing or wrong: {error}"
        ) from error
    for group in state.optimiser.param_groups:
        group["lr"] = config.learning_rate  # the flag wins over the file


class Progress:
    """What a person sees: a bar on a terminal, plain lines elsewhere, and `metrics.jsonl` always."""

    def __init__(self, config: Config, iteration: int) -> None:
        self.log = Path(config.out, "metrics.jsonl")
        self.batch_size, self.total = config.batch_size, config.iterations
        self.bar = tqdm(total=config.iterations, initial=iteration, file=sys.stdout, disable=None)
        if iteration == 0:  # what is there is of a run that never came to save anything
            self.log.unlink(missing_ok=True)
        self.restart()

    def restart(self) -> None:
        """Begin the next interval: what follows is averaged and timed anew."""
        self.started = time.perf_counter()
        self.waited = 0.0  # seconds blocked, waiting for a batch
        self.steps = 0
        self.sums: Tensor | float = 0.0  # stays on the device: reading it would wait for the steps to end

    def add(self, losses: Losses) -> None:
        """Count one step."""
        self.sums = self.sums + torch.stack([losses.total.detach(), losses.l1, losses.fft])
        self.steps += 1

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one, at once: a cluster's log would else stay empty for hours."""
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def report(self, iteration: int) -> None:
        """Report the interval: mean losses, speed, and the share of time spent waiting for data."""
        loss, l1, fft = torch.as_tensor(self.sums / self.steps).tolist()
        seconds = time.perf_counter() - self.started
        step, wait = seconds / self.steps, self.waited / seconds
        speed = self.batch_size / step
        values = {"loss": loss, "l1": l1, "fft": fft, "images_per_second": speed, "seconds_per_step": step}
        self.record(iteration, values | {"data_wait": wait})
        text = f"loss {loss:.5f}  {speed:.1f} images/s  {step:.4f} s/step  {wait:.1%} waiting for data  "
        text += f"(l1 {l1:.5f}, fft {fft:.4f})"
        if self.bar.disable:
            self.say(f"iteration {iteration}/{self.total}  {text}")
        else:
            self.bar.set_postfix_str(text)
            self.bar.update(iteration - self.bar.n)

    def report_validation(self, iteration: int, scores: Scores) -> None:
        """Report the scores of the averaged weights."""
        self.record(iteration, asdict(scores))
        text = " ".join(f"{name} {value:.4f} " for name, value in asdict(scores).items())
        self.say(f"validation at iteration {iteration}/{self.total}  {text}".rstrip())

    def record(self, iteration: int, values: dict[str, float]) -> None:
        """Add a line to the log."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"iteration": iteration, **values}) + "\n")


def validate(network: ShuffleMixer, images: ImageDataset, device: torch.device) -> Scores:
    """Average the scores over whole images, leaving out `scale` pixels along every edge."""
    upscale = network_upscaler(network, device)
    return mean_scores(scores for _, scores in score_pairs(upscale, shard_pairs(images), images.scale))


def train(config: Config) -> None:
    """Train until `config.iterations`. Raises ShardsError or CheckpointError for inputs that cannot be used."""
    device = pick_device(config.device)
    last = Path(config.out, "checkpoints", "last.pt")
    if config.resume is None and last.exists():
        raise CheckpointError(f"{last}: a run is already there; add --resume auto, or take another --out")
    data = open_patches(config)
    valid = None if config.valid_shards is None else ImageDataset(config.valid_shards, config.scale)
    state = new_state(config, device)
    if config.resume is not None and (config.resume != "auto" or last.exists()):
        restore(last if config.resume == "auto" else Path(config.resume), state, config)
    last.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress(config, state.iteration)
    progress.say(
        f"{config.model} x{config.scale}: {state.network.parameter_count():,} parameters, "
        f"{state.network.multiply_accumulates() / 1e9:.2f} GMACs for 1280 x 720, on {device}; "
        f"{len(data):,} samples per epoch from {config.shards}; {state.iteration} iterations done"
    )
    pinned = device.type == "cuda"
    loader = PatchLoader(data, config.batch_size, start=state.sample, threads=config.workers, pin_memory=pinned)
    stream = iter(loader)
    while state.iteration < config.iterations:
        asked = time.perf_counter()
        batch = next(stream)
        progress.waited += time.perf_counter() - asked
        progress.add(train_step(state, to_float(batch, device), config))

        due = {
            every: state.iteration % every == 0 or state.iteration == config.iterations
            for every in (config.log_every, config.validate_every, config.checkpoint_every)
        }
        if any(due.values()):
            progress.report(state.iteration)
            if due[config.checkpoint_every]:
                save_checkpoint(last, state, config)
            if valid is not None and due[config.validate_every]:
                progress.report_validation(state.iteration, validate(state.ema, valid, device))
            progress.restart()  # only now: saving and validating are no part of a step
    progress.say(f"finished: {state.iteration} iterations, {last}")
    progress.bar.close()


@click.command(context_settings={"show_default": True})
@click.option("--shards", required=True, help="Dataset to train on, made by `prep build-shards`.")
@click.option("--scale", required=True, type=int, help="2, 3 or 4.")
@click.option("--out", required=True, help="Folder for this run's log and checkpoints.")
@click.option("--model", default=Config.model, type=click.Choice(list(PRESETS)))
@click.option("--iterations", default=Config.iterations)
@click.option("--batch-size", default=Config.batch_size)
@click.option("--lr-patch", default=Config.lr_patch, help="Side of the LR crops, in LR pixels.")
@click.option("--learning-rate", default=Config.learning_rate, help="Adam's, constant.")
@click.option("--fft-weight", default=Config.fft_weight, help="Weight of the FFT loss beside L1; 0 leaves it out.")
@click.option("--ema-decay", default=Config.ema_decay, help="Of the weights' average; less in the first steps.")
@click.option("--workers", default=Config.workers, help="Threads that gather batches.")
@click.option("--seed", default=Config.seed, help="Of the first weights and of all samples.")
@click.option("--device", default=Config.device, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--valid-shards", help="Dataset to validate on, at this scale too.")
@click.option("--validate-every", default=Config.validate_every, help="Iterations; also at the end.")
@click.option("--checkpoint-every", default=Config.checkpoint_every, help="Iterations; also at the end.")
@click.option("--log-every", default=Config.log_every, help="Iterations.")
@click.option("--skip-small", is_flag=True, help="Leave out images smaller than the patch.")
@click.option("--resume", help="Checkpoint to continue from; auto: OUT's last one, if there is one.")
def main(**options: Any) -> None:
    """Train a super-resolution network from shards. The defaults are ShuffleMixer's published recipe."""
    try:
        config = Config(**options)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    try:
        train(config)
    except (ShardsError, CheckpointError, OSError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
