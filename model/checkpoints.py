"""Checkpoints: weights read from files, ours and published ones, and networks built of them."""

from __future__ import annotations

import dataclasses
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from model.shufflemixer import ShuffleMixer, ShuffleMixerConfig

WEIGHT_KEYS = {"ema": ("params_ema", "params"), "raw": ("params", "params_ema")}


class CheckpointError(Exception):
    """A file of weights that cannot be used: the message says which, what was expected and what was got."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights by their published names, and the shape of the network that they fit."""

    path: Path
    weights: Mapping[str, Tensor]
    weights_key: str  # "params_ema", "params", or "bare" for a file that is one state dict
    config: ShuffleMixerConfig

    def build(self) -> ShuffleMixer:
        """Build the network and load the weights strictly; CheckpointError if a name or shape differs."""
        network = ShuffleMixer.from_config(self.config)
        expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        got = {name: tuple(value.shape) for name, value in self.weights.items()}
        if expected != got:
            misfits = [
                f"{name}: expected {expected.get(name, 'no such name')}, got {got.get(name, 'nothing')}"
                for name in sorted(expected.keys() | got.keys())
                if expected.get(name) != got.get(name)
            ]
            more = f"; and {len(misfits) - 5} more" if len(misfits) > 5 else ""
            shown = "; ".join(misfits[:5])
            raise CheckpointError(f"{self.path}: not the weights of {self.config}: {shown}{more}")
        network.load_state_dict(self.weights)
        return network


def infer_config(weights: Mapping[str, Tensor]) -> ShuffleMixerConfig:
    """Tell the network's shape from its weights' names and shapes. Whether it shuffles cannot be told: it does.

    Raises KeyError for a weight that is missing, ValueError or IndexError for shapes that no network has.
    """
    features = weights["to_feat.weight"].shape[0]
    hidden, width = weights["blocks.0.net.0.mlp1.fc.0.weight"].shape[:2]
    if width not in (features // 2, features):
        raise ValueError(f"blocks.0.net.0.mlp1.fc.0.weight must take half or all of {features} features, got {width}")
    widening = weights["upsapling.0.weight"].shape[0] // features
    factors = {4: 2, 9: 3}
    if widening not in factors:
        raise ValueError(f"upsapling.0.weight must widen the features 4- or 9-fold, got {widening}-fold")
    return ShuffleMixerConfig(
        features=features,
        kernel_size=weights["blocks.0.net.0.spatial.weight"].shape[-1],
        blocks=len({match[1] for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}),
        mlp_ratio=hidden // width,
        scale=4 if "upsapling.3.weight" in weights else factors[widening],
        split=width != features,
        fused=any(re.match(r"blocks\.\d+\.conv\.", name) for name in weights),
        norm=any(re.search(r"\.norm[12]\.", name) for name in weights),
    )


def find_config(path: Path, content: Mapping[str, Any], weights: Mapping[str, Tensor]) -> ShuffleMixerConfig:
    """Give the shape of the network of a checkpoint: what its `network` says, or else what its weights tell.

    `network` is a mapping of the fields of `ShuffleMixerConfig`, by `dataclasses.asdict`. Raises CheckpointError,
    naming `path`, where it is malformed or contradicts the weights, or where these are not of such a network.
    """
    try:
        told = infer_config(weights)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: not the weights of a ShuffleMixer; missing or wrong: {error}") from error
    if (fields := content.get("network")) is None:
        return told
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"{path}: network: expected a mapping, got {type(fields).__name__}")
    known = {field.name: field.default for field in dataclasses.fields(ShuffleMixerConfig)}
    for name in fields:
        if name not in known:
            raise CheckpointError(f"{path}: network: expected fields {', '.join(known)}, got {name!r}")
    for name, default in known.items():
        if name not in fields and default is dataclasses.MISSING:
            raise CheckpointError(f"{path}: network: expected a field {name!r}, got none")
    try:
        config = ShuffleMixerConfig(**fields)
    except ValueError as error:
        raise CheckpointError(f"{path}: network: {error}") from error
    for name in known:
        if name != "shuffle" and getattr(config, name) != getattr(told, name):
            raise CheckpointError(
                f"{path}: network: the weights have {name} {getattr(told, name)}, got {getattr(config, name)}"
            )
    return config


def read_raw(path: Path) -> Mapping[str, Any]:
    """Read the mapping that a `torch.save` file holds, onto the CPU; CheckpointError if there is none.

    Always with `weights_only=True`: a file of weights must not be able to run code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a checkpoint")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch writes checksums, and does not look at them
                    raise zipfile.BadZipFile(f"{damaged} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise nearly anything, from KeyError to UnpicklingError
        # Torch's own words are left out: they advise to load the file in the way that lets it run code.
        raise CheckpointError(
            f"{path}: expected tensors written by torch.save, got a damaged file or other content"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a mapping of weights, got {type(content).__name__}")
    return content


def load_checkpoint(path: Path, prefer: Literal["ema", "raw"] = "ema") -> Checkpoint:
    """Read a checkpoint: ours, BasicSR's (`params`, `params_ema`), or a bare state dict.

    `prefer` says which weights to take from a file that holds both; with one set only, that one is taken.
    The network's shape is told from the weights, unless the file's `network` says it: see `find_config`.
    Raises CheckpointError.
    """
    content = read_raw(path)
    key = next((key for key in WEIGHT_KEYS[prefer] if key in content), "bare")
    weights = content if key == "bare" else content[key]
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        keys = ", ".join(map(str, list(content)[:8])) or "none"
        raise CheckpointError(f"{path}: expected weights in params_ema, params or at the top, got keys {keys}")
    weights = {str(name).removeprefix("module."): value for name, value in weights.items()}
    return Checkpoint(path, weights, key, find_config(path, content, weights))
