"""Networks from checkpoints."""

from __future__ import annotations

from pathlib import Path

from loader.errors import one_line
from model.checkpoints import Checkpoint, CheckpointError, load_checkpoint
from model.enlarge.options import Weights
from model.shufflemixer import ShuffleMixer


def open_network(path: Path, prefer: Weights, scale: int | None = None) -> tuple[Checkpoint, ShuffleMixer]:
    """Read a checkpoint and build its network on the CPU.

    Raises CheckpointError for an unusable checkpoint, or a network of another scale than `scale`.
    """
    checkpoint = load_checkpoint(path, prefer)
    if scale not in (None, checkpoint.config.scale):
        raise CheckpointError(f"{path}: expected a network for scale {scale}, got scale {checkpoint.config.scale}")
    return checkpoint, checkpoint.build()


def describe(checkpoint: Checkpoint, network: ShuffleMixer) -> str:
    """Return a line about the weights and the network."""
    config = checkpoint.config
    return one_line(
        f"checkpoint {checkpoint.path}: weights {checkpoint.weights_key}, {network.parameter_count()} parameters, "
        f"{config.features} features, kernel {config.kernel_size}, {config.blocks} blocks"
    )
