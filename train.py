"""Train a super-resolution network on shards: `python train.py --shards DIR --scale 4 --out runs/x`.

The defaults are the published ShuffleMixer recipe (Sun et al., NeurIPS 2022). Every sample is a pure function of the
seed and its number, so a resumed run (`--resume auto`) sees the same samples as an uninterrupted one, on any number of
GPUs: `torchrun --standalone --nproc-per-node 4 train.py ...`.

OUT receives `config.toml` (for `--config`), `metrics.jsonl`, `curves.png`, `samples/` (a comparison sheet per
validation), `checkpoints/` (`last.pt`, `best.pt`, the newest numbered ones), and `finished` after the last iteration.
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
from model.training import resume as resuming
from model.training import saving
from model.training.memory import fits_in_memory, largest_micro_batch, out_of_memory_message
from model.training.ranks import FAILURES, Ranks, describe_error, join_ranks
from model.training.reporter import Reporter
from model.training.resume import ResumePoint, open_run
from model.training.settings import WHOLE, Config, learning_rate
from model.training.settings_io import given_settings, setting_options, to_toml
from model.training.state import State, digest, from_checkpoint, new_state, to_checkpoint
from model.training.stopping import StopRequest, stop_request
from model.training.validation import bicubic_scores, draw_sheet, network_scores, open_validation
from prep.console.unix import UnixCommand

Batch = tuple[Tensor, Tensor]  # LR and HR
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingError(ShardsError):
    """A failure of the training itself, such as lack of memory or too many skipped steps."""


def add_gradients(forward: nn.Module, state: State, batch: Batch, fraction: float, config: Config) -> Losses:
    """Accumulate the gradients of a float micro-batch, a fraction of the rank's batch; return its losses, weighted."""
    lr, hr = batch
    with torch.autocast(lr.device.type, TYPES[config.precision], enabled=config.precision != "fp32"):
        sr = forward(lr)
    losses = combined(sr, hr, config.losses)  # float32
    torch.autograd.backward(state.scaler.scale(losses.total * fraction))
    return Losses(losses.total.detach() * fraction, {name: value * fraction for name, value in losses.parts.items()})


def sum_losses(parts: Sequence[Losses]) -> Losses:
    """Return the sum of losses, part by part."""
    total = torch.stack([one.total for one in parts]).sum()
    return Losses(total, {name: torch.stack([one.parts[name] for one in parts]).sum() for name in parts[0].parts})


def train_step(state: State, batch: Batch, config: Config, ranks: Ranks) -> Losses | None:
    """Train one step on this rank's uint8 batch and update the EMA; return the batch's mean losses.

    Return None, and skip the step, if the loss or a gradient is not finite on any rank.
    """
    samples = len(batch[0])
    size = state.micro_batch or samples
    state.optimiser.zero_grad()
    parts = []
    for first in range(0, samples, size):
        lr, hr = (side[first : first + size] for side in batch)
        with ranks.gradient_sync(state.forward, last=first + size >= samples):
            micro_batch = to_float((lr, hr), ranks.device)
            parts.append(add_gradients(state.forward, state, micro_batch, len(lr) / samples, config))
    losses = sum_losses(parts)
    state.iteration += 1

    health = losses.total
    if not state.scaler.is_enabled():  # the scaler checks gradients itself, and provokes overflows
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
    # Warm-up: with a constant decay of 0.999, the random initial weights would dominate for the first 1000 steps.
    decay = min(config.ema_decay, (1 + state.iteration) / (10 + state.iteration))
    with torch.no_grad():
        torch._foreach_lerp_(list(state.ema.parameters()), list(state.network.parameters()), 1 - decay)
    return losses


def choose_micro_batch(state: State, config: Config, ranks: Ranks, search: bool) -> int:
    """Return the number of samples per forward pass on a rank; search for it if `--micro-batch auto` and `search`."""
    samples = config.rank_batch_size(ranks.world_size)
    if isinstance(config.micro_batch, int):
        return min(config.micro_batch, samples)
    if config.micro_batch == WHOLE or not search:
        return samples

    def step(size: int) -> None:
        state.optimiser.zero_grad()
        lr, hr = (torch.zeros(size, 3, side, side) for side in (config.lr_patch, config.lr_patch * config.scale))
        add_gradients(state.network, state, to_float((lr, hr), ranks.device), 1.0, config)

    with ranks.fail_together():
        found = largest_micro_batch(samples, fits_in_memory(step, ranks.device))
    return ranks.minimum(found)


def open_patches(config: Config) -> PatchDataset:
    """Open the training dataset. ShardsError if it is damaged, lacks the scale, or has images below the patch size."""
    small: Literal["error", "skip"] = "skip" if config.skip_small else "error"
    try:
        return PatchDataset(config.shards, config.scale, config.lr_patch, seed=config.seed, too_small=small)
    except ShardsError as error:  # name the flag instead of the argument
        raise ShardsError(str(error).replace('too_small="skip"', "--skip-small")) from error


class Run:
    """A training run: datasets, state and reporter, and when to log, save and validate."""

    def __init__(
        self, config: Config, point: ResumePoint, ranks: Ranks, stop: StopRequest, *, allow_other_dataset: bool = False
    ) -> None:
        self.config, self.ranks, self.stop = config, ranks, stop
        self.out, self.checkpoints = Path(config.out), Path(config.out, "checkpoints")
        samples, gpu = config.rank_batch_size(ranks.world_size), ranks.device.type == "cuda"
        with ranks.fail_together():
            self.data = open_patches(config)
            self.valid = None if config.valid_shards is None else open_validation(config.valid_shards, config.scale)
            self.loader = PatchLoader(
                self.data, samples, rank=ranks.rank, world_size=ranks.world_size, threads=config.workers, pin_memory=gpu
            )
        self.identity = dataset_identity(self.data.shards.index, config.scale)
        valid = "" if self.valid is None else dataset_identity(self.valid.shards.index, config.scale)
        self.valid_name = resuming.short_id(valid)  # scores in the log are per dataset
        ranks.require_equal("datasets", f"--shards {self.identity}\n--valid-shards {valid or 'none'}")
        self.state = new_state(config, ranks)
        self.saved: tuple[Path | None, float] = (None, time.monotonic())  # newest checkpoint in OUT, time saved
        self.failure: Exception | None = None  # of this rank; raised on all ranks after the next exchange
        with ranks.fail_together():
            notes = self.restore(point, allow_other_dataset)
        ranks.require_equal("weights, moments and iteration", digest(self.state, self.position))
        (undecided,) = ranks.any_of(self.state.micro_batch is None)  # GPUs may differ, but all ranks must search
        if undecided:
            # On a CPU the system kills a process that uses too much memory; there is no error to catch.
            self.state.micro_batch = choose_micro_batch(self.state, config, ranks, search=gpu)
        assert self.state.micro_batch is not None

        with ranks.fail_together():
            if ranks.first:
                (self.out / "finished").unlink(missing_ok=True)
                write_atomically(self.out / "config.toml", to_toml(config).encode())
            self.reporter = Reporter(config, ranks, self.state.iteration, stop)
        network, parts = self.state.network, -(-samples // self.state.micro_batch)
        for line in [
            *notes,
            f"{config.model} x{config.scale}: {network.parameter_count():,} parameters, "
            f"{network.multiply_accumulates() / 1e9:.2f} GMACs at 1280 x 720; {config.precision} on {ranks.device}",
            *fallback_reasons(network, config.precision, config.compile),
            f"{len(self.data):,} samples per epoch from {config.shards}; batch size {config.batch_size} "
            f"(ranks: {ranks.world_size}, micro-batches: {parts}, samples per micro-batch: {self.state.micro_batch}); "
            f"{self.state.iteration} iterations done",
        ]:
            self.reporter.note(line)

    def restore(self, point: ResumePoint, allow_other_dataset: bool) -> list[str]:
        """Restore the checkpoint to resume from, if any; return messages for the user."""
        stream = {
            "scale": self.config.scale,
            "lr_patch": self.config.lr_patch,
            "augment": self.data.augment,
            "datasets": [self.identity],
        }
        self.position: dict[str, Any] = stream | self.loader.state_dict()  # of the next batch
        notes = [*point.notes, *resuming.changed_since(point, self.config)]
        if point.path is None:
            return notes
        path = Path(point.path)
        try:
            stored = from_checkpoint(point.content, self.state, self.config, self.ranks)
            self.position, changed = resuming.continue_stream(stored, self.position, allow_other_dataset)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        self.loader.load_state_dict(self.loader.state_dict() | {"sample": self.position["sample"]})
        self.saved = (path, time.monotonic())
        return [*notes, *changed]

    def due(self, every: int) -> bool:
        """True every `every` iterations and after the last one."""
        return self.state.iteration > 0 and (
            self.state.iteration % every == 0 or self.state.iteration == self.config.iterations
        )

    def save(self) -> Path:
        """Save a checkpoint unless this iteration has one; return its path."""
        path = self.checkpoints / saving.checkpoint_name(self.state.iteration)
        if self.saved[0] != path:
            content = to_checkpoint(self.state, self.position, self.config, self.ranks)
            saving.save(path, content, self.config.keep)
            self.saved = (path, time.monotonic())
        return path

    @contextmanager
    def defer_errors(self) -> Iterator[None]:
        """Keep an error of the enclosed work, which other ranks may not do; all ranks stop at the next exchange."""
        try:
            yield
        except FAILURES as error:
            self.failure = self.failure or error

    def validate(self) -> None:
        """Score the EMA weights and draw a sheet; on a stop request, leave validation to the resumed run."""
        assert self.valid is not None
        if self.ranks.first:
            with self.defer_errors():
                self.save()  # validation may fail
        bicubic: Scores | None = None
        if self.ranks.broadcast_flag(not self.reporter.has_score("bicubic_psnr_y", self.valid_name)):
            bicubic = bicubic_scores(self.valid, self.ranks, self.stop)
        scores = network_scores(self.state.ema, self.valid, self.ranks, self.stop, self.reporter.note)
        if scores is None or not self.ranks.first or self.failure:
            return
        with self.defer_errors():
            if scores.psnr_y > self.reporter.best_psnr(self.valid_name):
                saving.link_as(self.save(), saving.BEST)
            draw_sheet(self.state.ema, self.valid, self.ranks, self.out / "samples" / f"{self.state.iteration:08d}.png")
            self.reporter.report_scores(self.state.iteration, self.valid_name, scores, bicubic)
            write_curves(self.reporter.log, self.out / "curves.png")

    def fetch(self, stream: Iterator[Batch]) -> Batch | None:
        """Return this rank's next batch; None if the run is over or stopping, or after an error."""
        if self.stop or self.failure or self.state.iteration >= self.config.iterations:
            return None
        asked, batch = time.perf_counter(), None
        with self.defer_errors():
            batch = next(stream)
        self.reporter.wait_seconds += time.perf_counter() - asked
        return batch

    def step(self, batch: Batch) -> None:
        """Train one step; report a skipped one, and fail after too many in a row."""
        try:
            losses = train_step(self.state, batch, self.config, self.ranks)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"iteration {self.state.iteration + 1}: {out_of_memory_message(self.state.micro_batch, self.config)}"
            ) from error
        first, self.position = self.position["sample"], self.position | self.loader.state_dict()
        if losses is not None:
            self.reporter.add_step(losses)
            return
        last, in_row = first + self.config.batch_size - 1, self.state.skipped_in_row
        text = f"iteration {self.state.iteration}: non-finite loss or gradients for samples {first} to {last}"
        if in_row > self.config.max_skipped:
            text += f"; {in_row} such steps in a row, expected at most {self.config.max_skipped}"
            self.ranks.raise_together(TrainingError(text))  # the same on all ranks
        self.reporter.note(f"{text}; step skipped ({self.state.skipped} so far)")

    def train(self) -> None:
        """Train until all iterations are done or a stop is requested, then save."""
        config, state, reporter, ranks = self.config, self.state, self.reporter, self.ranks
        stream = iter(self.loader)
        while True:
            due = self.valid is not None and self.due(config.validate_every)
            if due and ranks.broadcast_flag(not reporter.has_score("psnr_y", self.valid_name, state.iteration)):
                with reporter.untimed():
                    self.validate()
            batch = self.fetch(stream)
            stopping, failing = ranks.any_of(bool(self.stop), self.failure is not None)
            if failing:
                ranks.raise_together(self.failure)
            if stopping or batch is None:
                break
            self.step(batch)
            with self.defer_errors():
                if any(self.due(n) for n in (config.log_every, config.validate_every, config.checkpoint_every)):
                    reporter.report(state.iteration, learning_rate(state.iteration - 1, config))
                late = time.monotonic() - self.saved[1] > 60 * config.checkpoint_minutes
                if ranks.first and (late or self.due(config.checkpoint_every)):
                    with reporter.untimed():
                        self.save()
        last = self.checkpoints / saving.LAST
        if ranks.first:
            self.save()
        if stopping:
            why = self.stop.signal or "a signal to another rank"
            reporter.note(
                f"stopped by {why} after iteration {state.iteration}; saved {last}; resume with --resume auto"
            )
        else:
            if ranks.first:
                (self.out / "finished").touch()
            reporter.note(f"finished: {state.iteration} iterations; saved {last}")
        reporter.close()
        if reporter.output_error is not None:
            raise reporter.output_error


@click.command(cls=UnixCommand)
@setting_options
@click.option("--resume", help="Checkpoint to resume from; auto: the newest undamaged one in OUT, if any.")
@click.option("--allow-other-dataset", is_flag=True, help="Resume even if the checkpoint is of another dataset.")
@click.pass_context
def main(context: click.Context, /, resume: str | None, allow_other_dataset: bool, **values: Any) -> None:
    """Train a super-resolution network on shards. The defaults are the published ShuffleMixer recipe.

    With --resume, other settings default to those of the checkpoint, and paths to those in OUT/config.toml.
    """
    chosen = given_settings(context, values)
    out = resuming.run_folder(chosen, resume)
    try:
        device = resuming.device_name(out, chosen, resume)
        with stop_request() as stop, join_ranks(device) as ranks, open_run(out, chosen, resume, ranks) as run:
            Run(*run, ranks, stop, allow_other_dataset=allow_other_dataset).train()
    except click.ClickException:
        raise
    except FAILURES as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in (errno.EPIPE, errno.ENOSPC):
            raise  # of standard output: UnixCommand handles it
        raise click.ClickException(describe_error(error)) from error


if __name__ == "__main__":
    main()
