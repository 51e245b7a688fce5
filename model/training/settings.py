"""The settings of a training run: one dataclass, from which the flags and the keys of a TOML file follow."""

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
WHOLE = "whole"  # a micro-batch that is all of a rank's share
AUTO = "auto"
PATHS = ("shards", "valid_shards", "out")
LOCAL = (*PATHS, "device")  # where a run happens, not what it computes: checkpoints do not hold these


class MicroBatch(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """A whole number of at least 1, "auto" or "whole"."""

    name = "N|auto|whole"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Take what a flag or a file says."""
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
    """A field of Config with the help of its flag; `low` and `below` bound its numbers."""
    return dataclasses.field(default=default, metadata={"help": help, "type": type, **limits})


def count(default: Any, help: str) -> Any:
    """A whole number of at least 1."""
    return setting(default, help, int, low=1, below=2**31)


def weight(default: float, of: str) -> Any:
    """The weight of one loss; LossConfig checks it."""
    return setting(default, f"Weight of the {of} loss; 0 leaves it out.", float)


@dataclass(frozen=True)
class Config:
    """One run's settings, as the flags of the same names; checkpoints keep all but `LOCAL`. ValueError for bad values.

    The defaults are the published recipe (Sun et al., "ShuffleMixer", NeurIPS 2022).
    """

    shards: str = setting(REQUIRED, "Dataset to train on, made by `prep build-shards`.", str)
    scale: int = setting(REQUIRED, "2, 3 or 4.", int)
    out: str = setting(REQUIRED, "Folder for this run's log, checkpoints and pictures.", str)
    model: str = setting("tiny", "Which published network.", click.Choice(list(PRESETS)))
    kernel_size: int | None = count(None, "Of the depth-wise convolutions, odd.  [default: the network's own]")
    shuffle: bool = setting(True, "Channel shuffle after each point-wise MLP.")
    split: bool = setting(True, "Point-wise MLPs on half of the channels, rather than on all.")
    fused: bool = setting(True, "The fused 3x3 convolutions.")
    norm: bool = setting(True, "The layer norms.")
    iterations: int = count(300_000, "Steps of the optimiser.")
    batch_size: int = count(64, "Samples in a step, of all ranks and micro-batches together.")
    micro_batch: int | str = setting(WHOLE, "Samples that a rank computes at once; auto: as fit its GPU.", MicroBatch())
    lr_patch: int = count(64, "Side of the LR crops, in LR pixels.")
    learning_rate: float = setting(5e-4, "Adam's.", float, low=0)
    schedule: str = setting("constant", "Of the learning rate.", click.Choice(SCHEDULES))
    warmup: int = setting(0, "Iterations in which the learning rate rises to its value.", int, low=0)
    ema_decay: float = setting(0.999, "Of the weights' average; less in the first steps.", float, low=0, below=1)
    l1_weight: float = weight(1.0, "L1")
    charbonnier_weight: float = weight(0.0, "Charbonnier")
    fft_weight: float = weight(0.1, "published FFT")
    fft_amplitude_weight: float = weight(0.0, "FFT amplitude")
    precision: str = setting("fp32", "Of the network; losses are in fp32.", click.Choice(PRECISIONS))
    activation_checkpointing: bool = setting(False, "Compute blocks again in the backward pass, to save memory.")
    compile: bool = setting(False, "Compile the network by torch.compile.")
    workers: int = setting(2, "Threads that gather batches, in each rank.", int, low=1, below=1025)
    seed: int = setting(0, "Of the first weights and of all samples.", int, low=0, below=2**63)
    device: str = setting(AUTO, "auto, cpu, cuda, cuda:1, ...", str)
    valid_shards: str | None = setting(None, "Dataset to validate on, at this scale too.", str)
    validate_every: int = count(5000, "Iterations; also at the end.")
    checkpoint_every: int = count(5000, "Iterations; also at the end.")
    checkpoint_minutes: float = setting(30.0, "Also after so many minutes.", float, low=0)
    keep: int = count(3, "Checkpoints kept, beside the best one.")
    log_every: int = count(100, "Iterations.")
    max_skipped: int = setting(20, "Steps in a row that may be skipped for a loss that is not finite.", int, low=0)
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
                got = "a path with a NUL" if path else "an empty one"
                raise ValueError(f"{flag(name)} must be a path, got {got}")
        _ = self.network, self.losses  # each refuses what it cannot be

    @property
    def network(self) -> ShuffleMixerConfig:
        """The shape of the network."""
        changes: dict[str, Any] = {name: getattr(self, name) for name in ("shuffle", "split", "fused", "norm")}
        if self.kernel_size is not None:
            changes["kernel_size"] = self.kernel_size
        return ShuffleMixerConfig.preset(self.model, self.scale, **changes)

    @property
    def losses(self) -> LossConfig:
        """How the losses add up."""
        return LossConfig(
            **{field.name: getattr(self, f"{field.name}_weight") for field in dataclasses.fields(LossConfig)}
        )

    def rank_batch_size(self, world_size: int) -> int:
        """Samples of a step that each of so many ranks computes."""
        return self.batch_size // world_size


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def learning_rate(iteration: int, config: Config) -> float:
    """The learning rate of a step, from the number of those before it.

    It rises linearly for `warmup` steps, then stays, or falls to 0 as half a cosine (Loshchilov and Hutter, "SGDR",
    ICLR 2017, without restarts).
    """
    if iteration < config.warmup:
        return config.learning_rate * (iteration + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    done = (iteration - config.warmup) / max(config.iterations - config.warmup, 1)
    return config.learning_rate * (1 + math.cos(math.pi * min(done, 1.0))) / 2
