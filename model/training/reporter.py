"""Progress reporting: a bar on a terminal, log lines elsewhere, `metrics.jsonl` always."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.losses import Losses
from model.metrics import Scores
from model.run_log import BICUBIC, LOG, VALID, append_record, read_log, score_of, write_log
from model.training.memory import peak_bytes
from model.training.ranks import Ranks
from model.training.settings import Config
from model.training.stopping import StopRequest
from prep.console.progress import Bar


class Reporter:
    """The reports of a run. All ranks count steps; rank 0 prints, and reads and writes the log.

    Losses and times are averaged over an interval: the steps since the last report. If standard output fails, the
    reporter requests a stop; the run saves and then raises `output_error`.
    """

    def __init__(self, config: Config, ranks: Ranks, iteration: int, stop: StopRequest) -> None:
        self.log, self.ranks, self.stop = Path(config.out, LOG), ranks, stop
        self.total, self.batch_size = config.iterations, config.batch_size
        self.output_error: Exception | None = None
        self.board: Any = None
        self.entries: list[dict[str, Any]] = []
        if ranks.first:  # entries after the checkpoint will be written again
            self.entries = [entry for entry in read_log(self.log) if entry["iteration"] <= iteration]
            write_log(self.log, self.entries)
            self.board = _tensorboard(self.log.with_name("tensorboard"), iteration)
        silent = None if ranks.first else True
        self.bar = Bar(total=config.iterations, initial=iteration, unit="iteration", file=sys.stdout, disable=silent)
        self.start_interval()

    def start_interval(self) -> None:
        """Start the next interval."""
        self.started = time.perf_counter()
        self.wait_seconds = 0.0  # seconds spent waiting for batches
        self.steps = 0
        self.sums: dict[str, Tensor] = {}  # on the device: reading them would synchronise

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Exclude the enclosed work from step timing."""
        paused = time.perf_counter()
        try:
            yield
        finally:
            self.started += time.perf_counter() - paused

    def add_step(self, losses: Losses) -> None:
        """Add the losses of one step to the interval."""
        for name, value in {"loss": losses.total.detach(), **losses.parts}.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1
        self.write_output(self.bar.update)

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one; flush it, or a cluster's log stays empty for hours."""

        def write() -> None:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

        if self.ranks.first:
            self.write_output(write)

    def write_output(self, write: Callable[[], object]) -> None:
        """Write to standard output; after a failure, such as a closed pipe, write nothing more."""
        if self.output_error is not None:
            return
        try:
            write()
        except Exception as error:  # raised again after the run has saved
            self.output_error, self.bar.disable = error, True
            self.stop.ask("a failed write to standard output")

    def report(self, iteration: int, learning_rate: float) -> None:
        """Report the interval, unless it has no steps, and start the next. All ranks must call this."""
        if self.steps:
            sums = self.ranks.sum(torch.stack(list(self.sums.values()))) / (self.steps * self.ranks.world_size)
            losses = dict(zip(self.sums, sums.tolist(), strict=True))
            seconds = time.perf_counter() - self.started
            step, wait = seconds / self.steps, self.wait_seconds / seconds
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
                self.note(
                    f"iteration {iteration}/{self.total}  loss {losses['loss']:.5f} ({parts})  "
                    f"learning rate {learning_rate:.2e}  {speed}  {step:.4f} s/step  {wait:.1%} waiting for data  "
                    f"{duration((self.total - iteration) * step)} left  peak memory {memory}"
                )
            else:  # the bar shows iterations, time per step and time left
                text = (
                    f"loss {losses['loss']:.5f} ({parts}), {learning_rate:.1e}, {speed}, {wait:.1%} waiting, {memory}"
                )
                self.write_output(lambda: self.bar.set_postfix_str(text))
                self.write_output(lambda: self.bar.update(iteration - self.bar.n))
        self.start_interval()

    def report_scores(self, iteration: int, valid: str, scores: Scores, bicubic: Scores | None = None) -> None:
        """Report the EMA weights' scores on the dataset `valid`, after those of bicubic enlargement if given."""
        if bicubic is not None:
            values = {BICUBIC + name: value for name, value in asdict(bicubic).items()}
            self.record(iteration, values | {VALID: valid})
            self.note(f"bicubic  {_line(bicubic)}")
        self.record(iteration, asdict(scores) | {VALID: valid})
        self.note(f"validation at iteration {iteration}/{self.total}  {_line(scores)}")

    def has_score(self, name: str, valid: str, iteration: int | None = None) -> bool:
        """On rank 0, return True if the log has this score on the dataset `valid`, at `iteration` if given."""
        return any(
            name in entry and entry.get(VALID) == valid and iteration in (None, entry["iteration"])
            for entry in self.entries
        )

    def best_psnr(self, valid: str) -> float:
        """Return the highest PSNR-Y so far on the dataset `valid`; -inf if there is none."""
        found = [entry["psnr_y"] for entry in self.entries if "psnr_y" in entry and entry.get(VALID) == valid]
        return max(map(score_of, found), default=-math.inf)

    def record(self, iteration: int, values: Mapping[str, Any]) -> None:
        """Add a record to the log, and its numbers to TensorBoard. OSError, naming the log, if it cannot be written."""
        if not self.ranks.first:
            return
        entry = {"iteration": iteration, **values}
        self.entries.append(entry)
        append_record(self.log, entry)
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, iteration)
            self.board.flush()

    def close(self) -> None:
        """Close the bar and TensorBoard's writer."""
        self.write_output(self.bar.close)
        if self.board is not None:
            self.board.close()


def duration(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _line(scores: Scores) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in asdict(scores).items())


def _tensorboard(folder: Path, iteration: int) -> Any:
    """Return a TensorBoard writer, or None if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=iteration + 1)
