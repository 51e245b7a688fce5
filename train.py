"""Train a super-resolution network from shards: `python train.py --shards DIR --scale 4 --out runs/x`.

The defaults are the published recipe of ShuffleMixer (Sun et al., NeurIPS 2022). Every sample is a pure function of
the seed and its number, so a run that is stopped and resumed (`--resume auto`) sees what an unbroken one sees, on any
number of GPUs: `torchrun --standalone --nproc-per-node 4 train.py ...`.

OUT gets `config.toml` (for `--config`), `metrics.jsonl`, `curves.png`, `samples/` (a sheet of pictures for each
validation), `checkpoints/` (`last.pt`, `best.pt`, the last few by number), and `finished` when all is done.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import click
import torch
from torch import Tensor, nn

from loader import PatchDataset, PatchLoader, ShardsError, to_float
from loader.format.identity import dataset_identity
from loader.system.safefile import write_atomically
from model.checkpoints import CheckpointError
from model.cpu.reasons import fallback_reasons
from model.device import is_out_of_memory
from model.evaluate.curves import write_curves
from model.losses import Losses, combined
from model.metrics import Scores
from model.training import resume as going_on
from model.training import saving
from model.training.memory import largest_part, too_large, tried
from model.training.progress import Progress
from model.training.ranks import FAILURES, Ranks, joined, told
from model.training.resume import Origin, started
from model.training.settings import WHOLE, Config, learning_rate
from model.training.sources import given, options, to_toml
from model.training.state import State, digest, from_checkpoint, new_state, to_checkpoint
from model.training.stopping import StopRequest, stop_request
from model.training.validation import bicubic_scores, draw_sheet, network_scores, open_validation
from prep.console.unix import UnixCommand

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

    with ranks.united():
        found = largest_part(share, tried(step, ranks.device))
    return ranks.least(found)


def open_patches(config: Config) -> PatchDataset:
    """Open the shards to train on; ShardsError if they are not whole, lack the scale, or are too small."""
    small: Literal["error", "skip"] = "skip" if config.skip_small else "error"
    try:
        return PatchDataset(config.shards, config.scale, config.lr_patch, seed=config.seed, too_small=small)
    except ShardsError as error:  # name the flag, not the argument
        raise ShardsError(str(error).replace('too_small="skip"', "--skip-small")) from error


class Run:
    """A run in its folder: what is trained, on what, and when it speaks, saves and validates."""

    def __init__(
        self, config: Config, origin: Origin, ranks: Ranks, stop: StopRequest, *, allow_other_dataset: bool = False
    ) -> None:
        self.config, self.ranks, self.stop = config, ranks, stop
        self.out, self.checkpoints = Path(config.out), Path(config.out, "checkpoints")
        share, pinned = config.share(ranks.world_size), ranks.device.type == "cuda"
        with ranks.united():
            self.data = open_patches(config)
            self.valid = None if config.valid_shards is None else open_validation(config.valid_shards, config.scale)
            self.loader = PatchLoader(
                self.data,
                share,
                rank=ranks.rank,
                world_size=ranks.world_size,
                threads=config.workers,
                pin_memory=pinned,
            )
        self.identity = dataset_identity(self.data.shards.index, config.scale)
        valid = "" if self.valid is None else dataset_identity(self.valid.shards.index, config.scale)
        self.valid_name = going_on.short(valid)  # what scores are kept by
        ranks.agree("datasets", f"--shards {self.identity}\n--valid-shards {valid or 'none'}")
        self.state = new_state(config, ranks)
        self.saved: tuple[Path | None, float] = (None, time.monotonic())  # the newest checkpoint here, and since when
        self.failure: Exception | None = None  # of what the other ranks do not do, until they hear of it
        with ranks.united():
            remarks = self.restore(origin, allow_other_dataset)
        ranks.agree("weights, moments and iteration", digest(self.state, self.place))
        (undecided,) = ranks.any_of(self.state.micro_batch is None)  # they decide together, though GPUs may differ
        if undecided:
            # Without a GPU, a process that asks for too much is killed; nothing is raised that could be caught.
            self.state.micro_batch = choose_micro_batch(self.state, config, ranks, ranks.device.type == "cuda")
        assert self.state.micro_batch is not None

        with ranks.united():
            if ranks.first:
                (self.out / "finished").unlink(missing_ok=True)
                write_atomically(self.out / "config.toml", to_toml(config).encode())
            self.progress = Progress(config, ranks, self.state.iteration, stop)
        network, parts = self.state.network, -(-share // self.state.micro_batch)
        for line in [
            *remarks,
            f"{config.model} x{config.scale}: {network.parameter_count():,} parameters, "
            f"{network.multiply_accumulates() / 1e9:.2f} GMACs for 1280 x 720; {config.precision} on {ranks.device}",
            *fallback_reasons(network, config.precision, config.compile),
            f"{len(self.data):,} samples per epoch from {config.shards}; {config.batch_size} samples a step "
            f"(ranks: {ranks.world_size}, micro-batches: {parts}, samples in each: {self.state.micro_batch}); "
            f"{self.state.iteration} iterations done",
        ]:
            self.progress.say(line)

    def restore(self, origin: Origin, allow_other_dataset: bool) -> list[str]:
        """Go on from where the run was, if it was anywhere; gives what is to be said about it."""
        stream = {
            "scale": self.config.scale,
            "lr_patch": self.config.lr_patch,
            "augment": self.data.augment,
            "datasets": [self.identity],
        }
        self.place: dict[str, Any] = stream | self.loader.state_dict()  # of the next step
        remarks = [*origin.remarks, *going_on.changes(origin, self.config)]
        if origin.path is None:
            return remarks
        path = Path(origin.path)
        try:
            place = from_checkpoint(origin.content, self.state, self.config, self.ranks)
            self.place, said = going_on.follow(place, self.place, allow_other_dataset)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        self.loader.load_state_dict(self.loader.state_dict() | {"sample": self.place["sample"]})
        self.saved = (path, time.monotonic())
        return [*remarks, *said]

    def due(self, every: int) -> bool:
        """Whether something that is done every so many iterations, and at the end, is to be done now."""
        return self.state.iteration > 0 and (
            self.state.iteration % every == 0 or self.state.iteration == self.config.iterations
        )

    def save(self) -> Path:
        """Write a checkpoint, unless this iteration has one."""
        path = self.checkpoints / saving.name_of(self.state.iteration)
        if self.saved[0] != path:
            content = to_checkpoint(self.state, self.place, self.config, self.ranks)
            saving.save(path, content, self.config.keep)
            self.saved = (path, time.monotonic())
        return path

    @contextmanager
    def alone(self) -> Iterator[None]:
        """In which the first rank does what the others do not: an error ends all of them, when they meet again."""
        try:
            yield
        except FAILURES as error:
            self.failure = self.failure or error

    def validate(self) -> None:
        """Score the averaged weights and draw pictures; if asked to stop meanwhile, leave it to the resumed run."""
        assert self.valid is not None
        if self.ranks.first:
            with self.alone():
                self.save()  # whatever becomes of the validation
        bicubic: Scores | None = None
        if self.ranks.decide(not self.progress.has("bicubic_psnr_y", self.valid_name)):
            bicubic = bicubic_scores(self.valid, self.ranks, self.stop)
        scores = network_scores(self.state.ema, self.valid, self.ranks, self.stop, self.progress.say)
        if scores is None or not self.ranks.first or self.failure:
            return
        with self.alone():
            if scores.psnr_y > self.progress.best(self.valid_name):
                saving.name_also(self.save(), saving.BEST)
            draw_sheet(self.state.ema, self.valid, self.ranks, self.out / "samples" / f"{self.state.iteration:08d}.png")
            self.progress.report_scores(self.state.iteration, self.valid_name, scores, bicubic)
            write_curves(self.progress.log, self.out / "curves.png")

    def fetch(self, stream: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
        """Wait for this rank's share of the next step; None if there is none to take, or it cannot be had."""
        if self.stop or self.failure or self.state.iteration >= self.config.iterations:
            return None
        asked, batch = time.perf_counter(), None
        with self.alone():
            batch = next(stream)
        self.progress.waited += time.perf_counter() - asked
        return batch

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Take one step; one that is not finite is skipped and told, and too many in a row are an error."""
        try:
            losses = train_step(self.state, batch, self.config, self.ranks)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"iteration {self.state.iteration + 1}: {too_large(self.state.micro_batch, self.config)}"
            ) from error
        first, self.place = self.place["sample"], self.place | self.loader.state_dict()
        if losses is not None:
            self.progress.add(losses)
            return
        last, in_row = first + self.config.batch_size - 1, self.state.skipped_in_row
        text = (
            f"iteration {self.state.iteration}: the loss or its gradients are not finite for samples {first} to {last}"
        )
        if in_row > self.config.max_skipped:
            text += f"; {in_row} steps in a row, expected at most {self.config.max_skipped}"
            self.ranks.settle(TrainingError(text))  # in all of them alike
        self.progress.say(f"{text}; skipped, {self.state.skipped} steps so far")

    def go(self) -> None:
        """Train until all iterations are done, or until asked to stop; then save."""
        config, state, progress, ranks = self.config, self.state, self.progress, self.ranks
        stream = iter(self.loader)
        while True:
            wanted = self.valid is not None and self.due(config.validate_every)
            if wanted and ranks.decide(not progress.has("psnr_y", self.valid_name, state.iteration)):
                with progress.pause():
                    self.validate()
            batch = self.fetch(stream)
            stopping, failing = ranks.any_of(bool(self.stop), self.failure is not None)
            if failing:
                ranks.settle(self.failure)
            if stopping or batch is None:
                break
            self.step(batch)
            with self.alone():
                if any(self.due(n) for n in (config.log_every, config.validate_every, config.checkpoint_every)):
                    progress.report(state.iteration, learning_rate(state.iteration - 1, config))
                late = time.monotonic() - self.saved[1] > 60 * config.checkpoint_minutes
                if ranks.first and (late or self.due(config.checkpoint_every)):
                    with progress.pause():
                        self.save()
        last = self.checkpoints / saving.LAST
        if ranks.first:
            self.save()
        if stopping:
            why = self.stop.signal or "a signal to another rank"
            progress.say(f"stopped by {why} after iteration {state.iteration}, saved in {last}; --resume auto goes on")
        else:
            if ranks.first:
                (self.out / "finished").touch()
            progress.say(f"finished: {state.iteration} iterations, {last}")
        progress.close()
        if progress.lost is not None:
            raise progress.lost


@click.command(cls=UnixCommand)
@options
@click.option("--resume", help="Checkpoint to go on from; auto: OUT's newest whole one, if there is one.")
@click.option("--allow-other-dataset", is_flag=True, help="Go on from a checkpoint with other samples to learn from.")
@click.pass_context
def main(context: click.Context, /, resume: str | None, allow_other_dataset: bool, **values: Any) -> None:
    """Train a super-resolution network from shards. The defaults are ShuffleMixer's published recipe.

    With --resume, settings that are not given are those of the checkpoint, and paths those of OUT/config.toml.
    """
    chosen = given(context, values)
    out = going_on.folder_of(chosen, resume)
    try:
        device = going_on.local_device(out, chosen, resume)
        with stop_request() as stop, joined(device) as ranks, started(out, chosen, resume, ranks) as (config, origin):
            Run(config, origin, ranks, stop, allow_other_dataset=allow_other_dataset).go()
    except click.ClickException:
        raise
    except (*FAILURES, TrainingError) as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in (errno.EPIPE, errno.ENOSPC):
            raise  # standard output's, which UnixCommand sees to
        raise click.ClickException(told(error)) from error


if __name__ == "__main__":
    main()
