"""Train a super-resolution network from shards: `python train.py --shards DIR --scale 4 --out runs/x`.

The defaults are the published recipe of ShuffleMixer (Sun et al., NeurIPS 2022). Every sample is a pure function of
the seed and its number, so a run that is stopped and resumed (`--resume auto`) sees what an unbroken one sees, on any
number of GPUs: `torchrun --standalone --nproc-per-node 4 train.py ...`.

OUT gets `config.toml` (for `--config`), `metrics.jsonl`, `curves.png`, `samples/` (a sheet of pictures for each
validation), `checkpoints/` (`last.pt`, `best.pt`, the last few by number), and `finished` when all is done.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click
import torch
from torch import Tensor, nn

from loader import ImageDataset, PatchDataset, PatchLoader, ShardsError, to_float
from loader.safefile import write_atomically
from model.checkpoints import CheckpointError, read_raw
from model.curves import write_curves
from model.losses import Losses, combined
from model.metrics import Scores
from model.shufflemixer import why_plain
from model.training import saving
from model.training.memory import largest_part, tried
from model.training.progress import Progress
from model.training.ranks import Ranks, joined
from model.training.settings import AUTO, WHOLE, Config, learning_rate, options, to_toml
from model.training.state import State, from_checkpoint, new_state, to_checkpoint
from model.training.stopping import StopRequest, stop_request
from model.training.validation import bicubic_scores, draw_sheet, network_scores

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingError(Exception):
    """A run that cannot go on: the message says why."""


def descend(forward: nn.Module, state: State, batch: tuple[Tensor, Tensor], part: float, config: Config) -> Losses:
    """Add the gradients of a float batch, which is such a part of this rank's share of a step; likewise its losses."""
    lr, hr = batch
    with torch.autocast(lr.device.type, TYPES[config.precision], enabled=config.precision != "fp32"):
        sr = forward(lr)
    losses = combined(sr, hr, config.losses)  # in float32
    torch.autograd.backward(state.scaler.scale(losses.total * part))
    return Losses(losses.total.detach() * part, {name: value * part for name, value in losses.parts.items()})


def added(parts: Sequence[Losses]) -> Losses:
    """Add up losses, each with those of its name."""
    total = torch.stack([one.total for one in parts]).sum()
    return Losses(total, {name: torch.stack([one.parts[name] for one in parts]).sum() for name in parts[0].parts})


def train_step(state: State, share: tuple[Tensor, Tensor], config: Config, ranks: Ranks) -> Losses | None:
    """Learn from this rank's share of a step, given as bytes, and let the average of the weights follow.

    Returns the mean losses of the share; None if something was not finite, in any rank: then nothing was learnt.
    """
    samples = len(share[0])
    size = state.micro_batch or samples
    state.optimiser.zero_grad()
    parts = []
    for first in range(0, samples, size):
        lr, hr = (side[first : first + size] for side in share)
        with ranks.together(state.forward, last=first + size >= samples):
            parts.append(descend(state.forward, state, to_float((lr, hr), ranks.device), len(lr) / samples, config))
    losses = added(parts)
    state.iteration += 1

    health = losses.total
    if not state.scaler.is_enabled():  # a scaler looks after gradients itself: it is to make them overflow at times
        gradients = [parameter.grad for parameter in state.network.parameters() if parameter.grad is not None]
        health = health + torch.stack(torch._foreach_norm(gradients)).sum()
    (broken,) = ranks.any_of(not health.isfinite().item())
    if broken:
        state.skipped, state.skipped_in_row = state.skipped + 1, state.skipped_in_row + 1
        return None
    state.skipped_in_row = 0
    for group in state.optimiser.param_groups:
        group["lr"] = learning_rate(state.iteration - 1, config)
    state.scaler.step(state.optimiser)
    state.scaler.update()
    # Warmed up: a plain average with decay 0.999 would still be mostly the random start after 1000 steps.
    decay = min(config.ema_decay, (1 + state.iteration) / (10 + state.iteration))
    with torch.no_grad():
        torch._foreach_lerp_(list(state.ema.parameters()), list(state.network.parameters()), 1 - decay)
    return losses


def choose_micro_batch(state: State, config: Config, ranks: Ranks, search: bool) -> int:
    """Decide how many samples a rank computes at once; "auto" tries it out where memory can be searched so."""
    share = config.share(ranks.world_size)
    if isinstance(config.micro_batch, int):
        return min(config.micro_batch, share)
    if config.micro_batch == WHOLE or not search:
        return share

    def step(samples: int) -> None:
        state.optimiser.zero_grad()
        lr, hr = (torch.zeros(samples, 3, side, side) for side in (config.lr_patch, config.lr_patch * config.scale))
        descend(state.network, state, to_float((lr, hr), ranks.device), 1.0, config)

    return ranks.least(largest_part(share, tried(step, ranks.device)))


def open_patches(config: Config) -> PatchDataset:
    """Open the shards to train on; ShardsError if they are not whole, lack the scale, or are too small."""
    small: Literal["error", "skip"] = "skip" if config.skip_small else "error"
    try:
        return PatchDataset(config.shards, config.scale, config.lr_patch, seed=config.seed, too_small=small)
    except ShardsError as error:  # name the flag, not the argument
        raise ShardsError(str(error).replace('too_small="skip"', "--skip-small")) from error


class Run:
    """A run in its folder: what is trained, on what, and when it speaks, saves and validates."""

    def __init__(self, config: Config, resume: str | None, ranks: Ranks, stop: StopRequest) -> None:
        self.config, self.ranks, self.stop = config, ranks, stop
        self.out, self.checkpoints = Path(config.out), Path(config.out, "checkpoints")
        if resume is None and saving.any_in(self.checkpoints):
            raise CheckpointError(
                f"{self.checkpoints}: a run is already there; add --resume auto, or take another --out"
            )
        self.data = open_patches(config)
        self.valid = None if config.valid_shards is None else ImageDataset(config.valid_shards, config.scale)
        share, pinned = config.share(ranks.world_size), ranks.device.type == "cuda"
        self.loader = PatchLoader(
            self.data, share, rank=ranks.rank, world_size=ranks.world_size, threads=config.workers, pin_memory=pinned
        )
        self.state = new_state(config, ranks)
        self.saved: tuple[Path | None, float] = (None, time.monotonic())  # the newest checkpoint here, and since when
        remarks = self.restore(resume)
        (undecided,) = ranks.any_of(self.state.micro_batch is None)  # they decide together, though GPUs may differ
        if undecided:
            # Without a GPU, a process that asks for too much is killed; nothing is raised that could be caught.
            self.state.micro_batch = choose_micro_batch(self.state, config, ranks, ranks.device.type == "cuda")
        assert self.state.micro_batch is not None

        self.out.mkdir(parents=True, exist_ok=True)
        if ranks.first:
            (self.out / "finished").unlink(missing_ok=True)
            write_atomically(self.out / "config.toml", to_toml(config).encode())
        self.progress = Progress(config, ranks, self.state.iteration)
        network, parts = self.state.network, -(-share // self.state.micro_batch)
        for line in [
            *remarks,
            f"{config.model} x{config.scale}: {network.parameter_count():,} parameters, "
            f"{network.multiply_accumulates() / 1e9:.2f} GMACs for 1280 x 720; {config.precision} on {ranks.device}",
            *why_plain(network, config.precision, config.compile),
            f"{len(self.data):,} samples per epoch from {config.shards}; {config.batch_size} samples a step "
            f"(ranks: {ranks.world_size}, micro-batches: {parts}, samples in each: {self.state.micro_batch}); "
            f"{self.state.iteration} iterations done",
        ]:
            self.progress.say(line)

    def restore(self, resume: str | None) -> list[str]:
        """Go on from a checkpoint, if there is one to go on from; gives what is to be said about it."""
        if resume in (None, AUTO):
            found = saving.read_newest(self.checkpoints)
        else:
            found = Path(str(resume)), read_raw(Path(str(resume))), []
        if found is None:
            return []
        path, content, remarks = found
        try:
            self.loader.load_state_dict(from_checkpoint(content, self.state, self.config, self.ranks))
        except (CheckpointError, ShardsError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        newer = saving.numbered(self.checkpoints)[:1]
        if resume != AUTO and newer and newer[0].name > saving.name_of(self.state.iteration):
            raise CheckpointError(f"{newer[0]}: is newer than {path}; take another --out, or --resume auto")
        self.saved = (path, time.monotonic())
        return [*remarks, f"going on from {path}"]

    def due(self, every: int) -> bool:
        """Whether something that is done every so many iterations, and at the end, is to be done now."""
        return self.state.iteration > 0 and (
            self.state.iteration % every == 0 or self.state.iteration == self.config.iterations
        )

    def save(self) -> Path:
        """Write a checkpoint, unless this iteration has one."""
        path = self.checkpoints / saving.name_of(self.state.iteration)
        if self.saved[0] != path:
            content = to_checkpoint(self.state, self.loader.state_dict(), self.config, self.ranks)
            saving.save(path, content, self.config.keep)
            self.saved = (path, time.monotonic())
        return path

    def validate(self, valid: ImageDataset) -> None:
        """Score the averaged weights and draw pictures; if asked to stop meanwhile, leave it to the resumed run."""
        bicubic: Scores | None = None
        if not self.progress.has("bicubic_psnr_y"):
            bicubic = bicubic_scores(valid, self.ranks, self.stop)
        scores = network_scores(self.state.ema, valid, self.ranks, self.stop)
        if scores is None:
            return
        if self.ranks.first:
            if scores.psnr_y > self.progress.best():
                saving.name_also(self.save(), saving.BEST)
            draw_sheet(self.state.ema, valid, self.ranks, self.out / "samples" / f"{self.state.iteration:08d}.png")
        self.progress.report_scores(self.state.iteration, scores, bicubic)
        if self.ranks.first:
            write_curves(self.progress.log, self.out / "curves.png")

    def step(self, batch: tuple[Tensor, Tensor], first: int) -> None:
        """Take one step; one that is not finite is skipped and told, and too many in a row are an error."""
        losses = train_step(self.state, batch, self.config, self.ranks)
        if losses is not None:
            self.progress.add(losses)
            return
        last, in_row = first + self.config.batch_size - 1, self.state.skipped_in_row
        text = (
            f"iteration {self.state.iteration}: the loss or its gradients are not finite for samples {first} to {last}"
        )
        if in_row > self.config.max_skipped:
            raise TrainingError(f"{text}; {in_row} steps in a row, expected at most {self.config.max_skipped}")
        self.progress.say(f"{text}; skipped, {self.state.skipped} steps so far")

    def go(self) -> None:
        """Train until all iterations are done, or until asked to stop; then save."""
        config, state, progress, ranks = self.config, self.state, self.progress, self.ranks
        stream = iter(self.loader)
        while True:
            if self.valid and self.due(config.validate_every) and not progress.has("psnr_y", state.iteration):
                with progress.pause():
                    self.validate(self.valid)
            (stopping,) = ranks.any_of(bool(self.stop))
            if stopping or state.iteration >= config.iterations:
                break
            first, asked = self.loader.state_dict()["sample"], time.perf_counter()
            batch = next(stream)
            progress.waited += time.perf_counter() - asked
            self.step(batch, first)
            if any(self.due(n) for n in (config.log_every, config.validate_every, config.checkpoint_every)):
                progress.report(state.iteration, learning_rate(state.iteration - 1, config))
            late = time.monotonic() - self.saved[1] > 60 * config.checkpoint_minutes
            if ranks.first and (late or self.due(config.checkpoint_every)):
                with progress.pause():
                    self.save()
        last = self.checkpoints / saving.LAST
        if stopping:
            if ranks.first:
                self.save()
            why = self.stop.signal or "a signal to another rank"
            progress.say(f"stopped by {why} after iteration {state.iteration}, saved in {last}; --resume auto goes on")
        else:
            if ranks.first:
                (self.out / "finished").touch()
            progress.say(f"finished: {state.iteration} iterations, {last}")
        progress.close()


@click.command()
@options
@click.option("--resume", help="Checkpoint to go on from; auto: OUT's newest whole one, if there is one.")
def main(resume: str | None, **settings: Any) -> None:
    """Train a super-resolution network from shards. The defaults are ShuffleMixer's published recipe."""
    try:
        config = Config(**settings)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    try:
        with stop_request() as stop, joined(config.device) as ranks:
            if config.batch_size % ranks.world_size:
                expected = f"a multiple of the {ranks.world_size} ranks"
                raise click.UsageError(f"--batch-size must be {expected}, got {config.batch_size}")
            Run(config, resume, ranks, stop).go()
    except (ShardsError, CheckpointError, TrainingError, MemoryError, OSError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
