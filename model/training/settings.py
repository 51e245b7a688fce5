"""The settings of a training run: one dataclass, from which the flags and the keys of a TOML file follow."""

import dataclasses
import json
import math
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from model.losses import LossConfig
from model.shufflemixer import PRESETS, ShuffleMixerConfig

SCHEDULES = ("constant", "cosine")
PRECISIONS = ("fp32", "bf16", "fp16")
Command = TypeVar("Command", bound=Callable[..., Any])
REQUIRED = dataclasses.MISSING
WHOLE = "whole"  # a micro-batch that is all of a rank's share
AUTO = "auto"


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
    return setting(default, help, int, low=1)


def weight(default: float, of: str) -> Any:
    """The weight of one loss; LossConfig checks it."""
    return setting(default, f"Weight of the {of} loss; 0 leaves it out.", float)


@dataclass(frozen=True)
class Config:
    """One run's settings, as the flags of the same names; kept in its checkpoints. ValueError for bad values.

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
    workers: int = count(2, "Threads that gather batches, in each rank.")
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

    def share(self, ranks: int) -> int:
        """Samples of a step that each of so many ranks computes."""
        return self.batch_size // ranks


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def options(command: Command) -> Command:
    """Give a command a flag for every setting, and `--config`; flags win over the file."""
    for field in reversed(dataclasses.fields(Config)):
        spelling, shown = flag(field.name), field.default not in (REQUIRED, None)
        if isinstance(field.default, bool):
            spelling += f"/{flag('no_' + field.name)}"
        command = click.option(
            spelling,
            field.name,
            type=field.metadata["type"],
            required=field.default is REQUIRED,
            default=field.default if shown else None,
            show_default=shown,
            help=field.metadata["help"],
        )(command)
    path = click.Path(path_type=Path, dir_okay=False)
    text = "TOML file of settings, named as the flags, with underscores; flags win."
    return click.option("--config", type=path, is_eager=True, expose_value=False, callback=_take_file, help=text)(
        command
    )


def _take_file(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Let the settings of a TOML file be the defaults; click.BadParameter if it is none or has other keys."""
    if path is None:
        return
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise click.BadParameter(f"{path}: {error}") from error
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for name, value in values.items():
        if name not in fields:
            raise click.BadParameter(f"{path}: {name}: expected one of {', '.join(fields)}")
        expected, kinds = _kinds(fields[name])
        if type(value) not in kinds:
            raise click.BadParameter(f"{path}: {name}: expected {expected}, got {value!r}")
    context.default_map = {**(context.default_map or {}), **values}


def _kinds(field: dataclasses.Field[Any]) -> tuple[str, tuple[type, ...]]:
    """The types that a setting may have in a file, in words and as such."""
    if isinstance(field.default, bool):
        return "true or false", (bool,)
    if field.metadata["type"] is int:
        return "a whole number", (int,)
    if field.metadata["type"] is float:
        return "a number", (int, float)
    if isinstance(field.metadata["type"], MicroBatch):
        return "a whole number or a string", (int, str)
    return "a string", (str,)


def to_toml(config: Config) -> str:
    """Settings as a file that `--config` takes."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in asdict(config).items() if value is not None]
    return "\n".join(lines) + "\n"


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
