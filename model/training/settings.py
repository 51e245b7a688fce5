"""The settings of a training run: one dataclass that defines the flags and the keys of TOML files."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import click

from model.losses import LossConfig
from model.shufflemixer import PRESETS, ShuffleMixerConfig

SCHEDULES = ("constant", "cosine")
PRECISIONS = ("fp32", "bf16", "fp16")
REQUIRED = dataclasses.MISSING
WHOLE = "whole"  # a micro-batch of the rank's whole batch
AUTO = "auto"
PATHS = ("shards", "valid_shards", "out")
LOCAL = (*PATHS, "device")  # where a run happens, not what it computes: not stored in checkpoints


class MicroBatch(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """A positive integer, "auto" or "whole"."""

    name = "N|auto|whole"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Return the value of a flag or a file."""
        if value in (AUTO, WHOLE):
            return str(value)
        try:
            number = int(value)
        except ValueError:
            number = 0
        if number < 1:
            self.fail(f"expected a number of at least 1, {AUTO} or {WHOLE}, got {value!r}", param, ctx)
        return number


def setting(default: Any, help: str, type: Any = None, **limits: float) -> Any:
    """Return a field of Config with the help of its flag; its numbers are at least `low` and less than `below`."""
    return dataclasses.field(default=default, metadata={"help": help, "type": type, **limits})


def count(default: Any, help: str) -> Any:
    """Return a field of Config that is a positive integer."""
    return setting(default, help, int, low=1, below=2**31)


def weight(default: float, of: str) -> Any:
    """Return a field of Config that is the weight of a loss; LossConfig checks its range."""
    return setting(default, f"Weight of the {of} loss; 0 disables it.", float)


@dataclass(frozen=True)
class Config:
    """The settings of a run, one per flag; checkpoints store all but `LOCAL`. ValueError for invalid values.

    The defaults are the published recipe (Sun et al., "ShuffleMixer", NeurIPS 2022).
    """

    shards: str = setting(REQUIRED, "Training dataset, built by `prep build-shards`.", str)
    scale: int = setting(REQUIRED, "Upscaling factor: 2, 3 or 4.", int)
    out: str = setting(REQUIRED, "Output folder for the log, checkpoints and pictures.", str)
    model: str = setting("tiny", "Published network.", click.Choice(list(PRESETS)))
    kernel_size: int | None = count(None, "Kernel size of the depth-wise convolutions, odd.  [default: the model's]")
    shuffle: bool = setting(True, "Shuffle channels after each point-wise MLP.")
    split: bool = setting(True, "Apply point-wise MLPs to half of the channels, not to all.")
    fused: bool = setting(True, "Use the fused 3x3 convolutions.")
    norm: bool = setting(True, "Use layer norms.")
    iterations: int = count(300_000, "Optimiser steps.")
    batch_size: int = count(64, "Samples per step, over all ranks and micro-batches.")
    micro_batch: int | str = setting(
        WHOLE, "Samples computed at once on each rank; auto: as many as fit.", MicroBatch()
    )
    lr_patch: int = count(64, "Side length of the LR crops in pixels.")
    learning_rate: float = setting(5e-4, "Learning rate of Adam.", float, low=0)
    schedule: str = setting("constant", "Learning rate schedule.", click.Choice(SCHEDULES))
    warmup: int = setting(0, "Iterations of linear learning rate warm-up.", int, low=0)
    ema_decay: float = setting(0.999, "EMA decay of the weights; lower in the first steps.", float, low=0, below=1)
    l1_weight: float = weight(1.0, "L1")
    charbonnier_weight: float = weight(0.0, "Charbonnier")
    fft_weight: float = weight(0.1, "published FFT")
    fft_amplitude_weight: float = weight(0.0, "FFT amplitude")
    precision: str = setting("fp32", "Precision of the network; losses stay in fp32.", click.Choice(PRECISIONS))
    activation_checkpointing: bool = setting(False, "Recompute blocks in the backward pass to save memory.")
    compile: bool = setting(False, "Compile the network with torch.compile.")
    workers: int = setting(2, "Threads per rank that gather batches.", int, low=1, below=1025)
    seed: int = setting(0, "Seed of the initial weights and of all samples.", int, low=0, below=2**63)
    device: str = setting(AUTO, "Device: auto, cpu, cuda, cuda:1, ...", str)
    valid_shards: str | None = setting(None, "Validation dataset with the same scale.", str)
    validate_every: int = count(5000, "Validate every N iterations and at the end.")
    checkpoint_every: int = count(5000, "Save a checkpoint every N iterations and at the end.")
    checkpoint_minutes: float = setting(30.0, "Also save every N minutes.", float, low=0)
    keep: int = count(3, "Checkpoints to keep in addition to the best.")
    log_every: int = count(100, "Log every N iterations.")
    max_skipped: int = setting(20, "Non-finite steps in a row to skip before giving up.", int, low=0)
    skip_small: bool = setting(False, "Leave out images smaller than the patch.")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            low, high = field.metadata.get("low", -math.inf), field.metadata.get("below", math.inf)
            value = getattr(self, field.name)
            if field.metadata["type"] in (int, float) and value is not None and not low <= value < high:
                bounds = f"below {high}" if low == -math.inf else f"at least {low} and below {high}"
                raise ValueError(f"{flag(field.name)} must be {bounds}, got {value}")
            kind = field.metadata["type"]
            if isinstance(kind, MicroBatch) and value not in (AUTO, WHOLE) and not (type(value) is int and value >= 1):
                raise ValueError(f"{flag(field.name)} must be at least 1, {AUTO} or {WHOLE}, got {value!r}")
            if isinstance(kind, click.Choice) and value not in kind.choices:
                raise ValueError(f"{flag(field.name)} must be one of {', '.join(kind.choices)}, got {value!r}")
        for name in PATHS:
            path = getattr(self, name)
            if path is not None and (not path or "\0" in path):
                got = "one with a NUL character" if path else "an empty one"
                raise ValueError(f"{flag(name)} must be a path, got {got}")
        _ = self.network, self.losses  # both validate their values

    @property
    def network(self) -> ShuffleMixerConfig:
        """The network's configuration."""
        changes: dict[str, Any] = {name: getattr(self, name) for name in ("shuffle", "split", "fused", "norm")}
        if self.kernel_size is not None:
            changes["kernel_size"] = self.kernel_size
        return ShuffleMixerConfig.preset(self.model, self.scale, **changes)

    @property
    def losses(self) -> LossConfig:
        """The weights of the losses."""
        return LossConfig(
            **{field.name: getattr(self, f"{field.name}_weight") for field in dataclasses.fields(LossConfig)}
        )

    def rank_batch_size(self, world_size: int) -> int:
        """Return the number of samples per step on each rank."""
        return self.batch_size // world_size


def flag(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def learning_rate(iteration: int, config: Config) -> float:
    """Return the learning rate of the step with this number, from 0.

    It rises linearly for `warmup` steps, then stays constant or falls to 0 along half a cosine (Loshchilov and Hutter,
    "SGDR", ICLR 2017, without restarts).
    """
    if iteration < config.warmup:
        return config.learning_rate * (iteration + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    done = (iteration - config.warmup) / max(config.iterations - config.warmup, 1)
    return config.learning_rate * (1 + math.cos(math.pi * min(done, 1.0))) / 2
