"""The state of a training run, and its conversion to and from checkpoints."""

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.checkpoints import CheckpointError
from model.shufflemixer import ShuffleMixer
from model.training.ranks import Ranks
from model.training.settings import AUTO, Config
from model.training.settings_io import portable_settings
from model.training.vetting import check_content

ADAM_BETAS = (0.9, 0.99)
# Settings that the largest micro-batch depends on, besides the GPU and the network.
MEMORY_SETTINGS = ("lr_patch", "precision", "activation_checkpointing", "compile")


@dataclass
class State:
    """Everything that training changes, except the position in the sample stream.

    `forward` is `network`, compiled and wrapped for several ranks if the settings ask for it.
    """

    network: ShuffleMixer
    forward: nn.Module
    ema: ShuffleMixer
    optimiser: torch.optim.Adam
    scaler: torch.amp.GradScaler  # disabled except for fp16
    iteration: int = 0
    skipped: int = 0  # steps with non-finite losses or gradients
    skipped_in_row: int = 0
    micro_batch: int | None = None  # samples computed at once on a rank; None: undecided


def new_state(config: Config, ranks: Ranks) -> State:
    """Return the state of a new run, with weights initialised from the seed."""
    torch.manual_seed(config.seed)
    network = ShuffleMixer.from_config(config.network).to(ranks.device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = copy.deepcopy(network).requires_grad_(False)
    network.activation_checkpointing = config.activation_checkpointing
    compiled: nn.Module = torch.compile(network) if config.compile else network  # type: ignore[assignment]
    forward = ranks.wrap(compiled)
    optimiser = torch.optim.Adam(network.parameters(), lr=config.learning_rate, betas=ADAM_BETAS, fused=True)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.precision == "fp16")
    return State(network, forward, ema, optimiser, scaler)


def to_checkpoint(state: State, position: Mapping[str, Any], config: Config, ranks: Ranks) -> dict[str, Any]:
    """Return the content of a checkpoint, with weights in BasicSR's layout; `position` is that in the sample stream."""

    def plain(network: ShuffleMixer) -> dict[str, Tensor]:
        return {name: value.cpu().contiguous() for name, value in network.state_dict().items()}

    return {
        "params": plain(state.network),
        "params_ema": plain(state.ema),
        "network": asdict(config.network),
        "iteration": state.iteration,
        "place": dict(position),  # in the sample stream
        "optimiser": state.optimiser.state_dict(),
        "scaler": state.scaler.state_dict(),
        "random": torch.get_rng_state(),
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
        "micro_batch": state.micro_batch,
        "micro_batch_for": _memory_needs(config, ranks),
        "config": portable_settings(config),
    }


def from_checkpoint(content: Mapping[str, Any], state: State, config: Config, ranks: Ranks) -> dict[str, Any]:
    """Restore a new state from a checkpoint, and return the position in the sample stream.

    The optimiser's options, including the learning rate, are those of `config`. Raises CheckpointError if the
    checkpoint is of another network or invalid.
    """
    content = check_content(content, to_checkpoint(state, {}, config, ranks), list(state.network.parameters()))
    try:
        expected = asdict(config.network)
        if content["network"] != expected:
            raise ValueError(f"network: expected {expected}, got {content['network']}")
        state.network.load_state_dict(content["params"])
        state.ema.load_state_dict(content["params_ema"])
        groups = state.optimiser.state_dict()["param_groups"]
        state.optimiser.load_state_dict({"state": content["optimiser"]["state"], "param_groups": groups})
        if state.scaler.is_enabled() and content["scaler"]:
            state.scaler.load_state_dict(content["scaler"])
        torch.set_rng_state(content["random"])
        state.iteration = int(content["iteration"])
        state.skipped, state.skipped_in_row = int(content["skipped"]), int(content["skipped_in_row"])
        if config.micro_batch == AUTO and content["micro_batch_for"] == _memory_needs(config, ranks):
            state.micro_batch = min(int(content["micro_batch"]), config.rank_batch_size(ranks.world_size))
        return dict(content["place"])
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"expected a train.py checkpoint; missing or invalid: {error}") from error


def _memory_needs(config: Config, ranks: Ranks) -> dict[str, Any]:
    """Return what the largest micro-batch that fits depends on."""
    gpu = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ""
    return {"gpu": gpu, "network": asdict(config.network)} | {name: getattr(config, name) for name in MEMORY_SETTINGS}


def digest(state: State, position: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what must be equal on all ranks: weights, moments, counters and position."""
    content = hashlib.sha256()
    moments = state.optimiser.state_dict()["state"]
    tensors = [*state.network.state_dict().items(), *state.ema.state_dict().items()]
    tensors += [(f"{index}.{name}", value) for index, one in moments.items() for name, value in one.items()]
    for name, value in tensors:
        content.update(name.encode())
        if isinstance(value, Tensor):
            content.update(value.detach().cpu().contiguous().numpy().tobytes())
    numbers = state.iteration, state.skipped, state.skipped_in_row, state.scaler.state_dict(), sorted(position.items())
    content.update(repr(numbers).encode())
    return content.hexdigest()
