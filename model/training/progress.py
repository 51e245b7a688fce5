"""What a person sees of a run: a bar on a terminal, plain lines elsewhere, `metrics.jsonl` always."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loader.system.safefile import open_to_write, read_member, write_atomically
from model.losses import Losses
from model.metrics import Scores
from model.training.memory import peak_bytes
from model.training.ranks import Ranks
from model.training.settings import Config
from model.training.stopping import StopRequest
from prep.console.progress import Bar

LOG = "metrics.jsonl"
LIMIT = 1 << 30  # bytes of a log that is read
VALID = "valid"  # a score's dataset, by the first digits of its identity
BICUBIC = "bicubic_"  # begins the names of bicubic enlargement's scores


class Progress:
    """The reports of a run; all ranks count, the first one speaks, writes, and knows what was written.

    An interval is what happens from one report of the losses to the next: means and times are over it. Once standard
    output takes no more, the run is asked to stop: it saves, and then raises `lost`.
    """

    def __init__(self, config: Config, ranks: Ranks, iteration: int, stop: StopRequest) -> None:
        self.log, self.ranks, self.stop = Path(config.out, LOG), ranks, stop
        self.total, self.batch_size = config.iterations, config.batch_size
        self.lost: Exception | None = None
        self.board: Any = None
        self.entries: list[dict[str, Any]] = []
        if ranks.first:  # what a killed run wrote after its last checkpoint will come again
            self.entries = [entry for entry in read_log(self.log) if entry["iteration"] <= iteration]
            write_atomically(self.log, "".join(map(_json, self.entries)).encode())
            self.board = _tensorboard(self.log.with_name("tensorboard"), iteration)
        silent = None if ranks.first else True
        self.bar = Bar(total=config.iterations, initial=iteration, unit="iteration", file=sys.stdout, disable=silent)
        self.restart()

    def restart(self) -> None:
        """Begin the next interval."""
        self.started = time.perf_counter()
        self.waited = 0.0  # seconds blocked, waiting for a batch
        self.steps = 0
        self.sums: dict[str, Tensor] = {}  # they stay on the device: reading them would wait for the steps to end

    @contextmanager
    def pause(self) -> Iterator[None]:
        """In which to do what is no part of a step, and is not to count as its time."""
        paused = time.perf_counter()
        try:
            yield
        finally:
            self.started += time.perf_counter() - paused

    def add(self, losses: Losses) -> None:
        """Count one step."""
        for name, value in {"loss": losses.total.detach(), **losses.parts}.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1
        self.output(self.bar.update)

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one, at once: a cluster's log would else stay empty for hours."""

        def write() -> None:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

        if self.ranks.first:
            self.output(write)

    def output(self, write: Callable[[], object]) -> None:
        """Write to standard output; nothing any more once that has failed, as when its reader is gone."""
        if self.lost is not None:
            return
        try:
            write()
        except Exception as error:  # raised again when the run has saved
            self.lost, self.bar.disable = error, True
            self.stop.ask("standard output, which takes no more")

    def report(self, iteration: int, learning_rate: float) -> None:
        """Report the interval and begin the next: all ranks must call it. An interval without steps is left out."""
        if self.steps:
            sums = self.ranks.total(torch.stack(list(self.sums.values()))) / (self.steps * self.ranks.world_size)
            losses = dict(zip(self.sums, sums.tolist(), strict=True))
            seconds = time.perf_counter() - self.started
            step, wait = seconds / self.steps, self.waited / seconds
            values = losses | {
                "learning_rate": learning_rate,
                "images_per_second": self.batch_size / step,
                "seconds_per_step": step,
                "data_wait": wait,
                "peak_memory": peak_bytes(self.ranks.device),
            }
            self.record(iteration, values)
            parts = ", ".join(f"{name} {value:.5f}" for name, value in losses.items() if name != "loss")
            speed, memory = f"{self.batch_size / step:.1f} images/s", f"{values['peak_memory'] / 2**30:.2f} GiB"
            if self.bar.disable:
                self.say(
                    f"iteration {iteration}/{self.total}  loss {losses['loss']:.5f} ({parts})  "
                    f"learning rate {learning_rate:.2e}  {speed}  {step:.4f} s/step  {wait:.1%} waiting for data  "
                    f"{duration((self.total - iteration) * step)} left  peak memory {memory}"
                )
            else:  # the bar itself tells iterations, time per step and time left
                text = (
                    f"loss {losses['loss']:.5f} ({parts}), {learning_rate:.1e}, {speed}, {wait:.1%} waiting, {memory}"
                )
                self.output(lambda: self.bar.set_postfix_str(text))
                self.output(lambda: self.bar.update(iteration - self.bar.n))
        self.restart()

    def report_scores(self, iteration: int, valid: str, scores: Scores, bicubic: Scores | None = None) -> None:
        """Report the averaged weights' scores on the dataset `valid`, and once those of bicubic enlargement on it."""
        if bicubic is not None:
            values = {BICUBIC + name: value for name, value in asdict(bicubic).items()}
            self.record(iteration, values | {VALID: valid})
            self.say(f"bicubic  {_line(bicubic)}")
        self.record(iteration, asdict(scores) | {VALID: valid})
        self.say(f"validation at iteration {iteration}/{self.total}  {_line(scores)}")

    def has(self, name: str, valid: str, iteration: int | None = None) -> bool:
        """Whether the first rank's log has a score on the dataset `valid`, of an iteration or of any."""
        return any(
            name in entry and entry.get(VALID) == valid and iteration in (None, entry["iteration"])
            for entry in self.entries
        )

    def best(self, valid: str) -> float:
        """The highest PSNR-Y of all validations on the dataset `valid` so far; -inf where there was none."""
        found = [entry["psnr_y"] for entry in self.entries if "psnr_y" in entry and entry.get(VALID) == valid]
        return max(map(score_of, found), default=-math.inf)

    def record(self, iteration: int, values: Mapping[str, Any]) -> None:
        """Add a line to the log, and its numbers to TensorBoard. OSError naming the log if it cannot be written."""
        if not self.ranks.first:
            return
        entry = {"iteration": iteration, **values}
        self.entries.append(entry)
        data = _json(entry).encode()
        descriptor = open_to_write(self.log)
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.log)) from error
        finally:
            os.close(descriptor)
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, iteration)
            self.board.flush()

    def close(self) -> None:
        """End the bar's line."""
        self.output(self.bar.close)
        if self.board is not None:
            self.board.close()


def score_of(value: Any) -> float:
    """A score of the log: null is infinity, the PSNR of equal images, for which JSON has no number; -inf for none."""
    if value is None:
        return math.inf
    return float(value) if isinstance(value, int | float) and not math.isnan(value) else -math.inf


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Give the lines of a run's log; a last line that a kill cut off is left out. OSError if it cannot be read."""
    if not path.exists():
        return
    for line in read_member(path, LIMIT).split(b"\n"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and type(entry.get("iteration")) is int:
            yield entry


def duration(seconds: float) -> str:
    """A time as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _json(entry: Mapping[str, Any]) -> str:
    """A line of the log: JSON, which has no infinity and no NaN."""
    return (
        json.dumps({name: value if _finite(value) else None for name, value in entry.items()}, allow_nan=False) + "\n"
    )


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _line(scores: Scores) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in asdict(scores).items())


def _tensorboard(folder: Path, iteration: int) -> Any:
    """A TensorBoard writer where that is installed, else None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=iteration + 1)
