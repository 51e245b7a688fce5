"""Checkpoints: weights read from files, ours and published ones, and networks built of them."""

from __future__ import annotations

import dataclasses
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from loader.errors import ShardsError, one_line
from model.shufflemixer import ShuffleMixer, ShuffleMixerConfig
from model.torchfile.archive import Archive, ArchiveError, open_archive
from model.torchfile.stored import StoredTensor
from model.torchfile.unpickle import PickleError

WEIGHTS_OF_BLOCK = 20  # at least: two layers, each of five convolutions with their biases
# What zipfile and torch raise for damaged files.
DAMAGE = (ValueError, zipfile.BadZipFile, NotImplementedError, EOFError, OverflowError, struct.error)
WEIGHT_KEYS = {"ema": ("params_ema", "params"), "raw": ("params", "params_ema")}


class CheckpointError(ShardsError):
    """A file of weights that cannot be used, in one line: which, what was expected and what was got."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class HasShape(Protocol):
    """A tensor, or the description of one."""

    @property
    def shape(self) -> Sequence[int]:
        """Its sizes."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights by their published names, and the shape of the network that they fit."""

    path: Path
    weights: Mapping[str, Tensor]
    weights_key: str  # "params_ema", "params", or "bare" for a file that is one state dict
    config: ShuffleMixerConfig

    def build(self) -> ShuffleMixer:
        """Build the network and load the weights strictly; CheckpointError if a name or shape differs."""
        check_shapes(self.path, self.config, self.weights)
        network = ShuffleMixer.from_config(self.config)
        network.load_state_dict(self.weights)  # in float32, whatever they were stored as
        return network


def infer_config(weights: Mapping[str, HasShape]) -> ShuffleMixerConfig:
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
    blocks = len({match[1] for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))})
    if len(weights) < WEIGHTS_OF_BLOCK * blocks:
        raise ValueError(f"{blocks} blocks must have at least {WEIGHTS_OF_BLOCK} weights each, got {len(weights)}")
    return ShuffleMixerConfig(
        features=features,
        kernel_size=weights["blocks.0.net.0.spatial.weight"].shape[-1],
        blocks=blocks,
        mlp_ratio=hidden // width,
        scale=4 if "upsapling.3.weight" in weights else factors[widening],
        split=width != features,
        fused=any(re.match(r"blocks\.\d+\.conv\.", name) for name in weights),
        norm=any(re.search(r"\.norm[12]\.", name) for name in weights),
    )


def find_config(path: Path, content: Mapping[str, Any], weights: Mapping[str, HasShape]) -> ShuffleMixerConfig:
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

    It is read as data (see `model.torchfile.unpickle`): a file of weights must not be able to run code,
    nor to take more memory than it has bytes. Tensors that share a storage in the file share their memory.
    """
    with _open(path) as archive:
        content: Mapping[str, Any] = archive.read_content()
        return content


def load_checkpoint(path: Path, prefer: Literal["ema", "raw"] = "ema") -> Checkpoint:
    """Read a checkpoint: ours, BasicSR's (`params`, `params_ema`), or a bare state dict.

    `prefer` says which weights to take from a file that holds both; with one set only, that one is taken.
    The network's shape is told from the weights, unless the file's `network` says it: see `find_config`. Prefixes
    that DataParallel and torch.compile put before names are taken off. Nothing is allocated before every name and
    shape is compared with those of the network. Raises CheckpointError.
    """
    with _open(path) as archive:
        content = archive.content
        key = next((key for key in WEIGHT_KEYS[prefer] if key in content), "bare")
        found = content if key == "bare" else content[key]
        if not isinstance(found, dict) or not all(isinstance(value, StoredTensor) for value in found.values()):
            keys = ", ".join(map(str, list(content)[:8]))[:200] or "none"
            raise CheckpointError(f"{path}: expected weights in params_ema, params or at the top, got keys {keys}")
        stored: dict[str, StoredTensor] = {}
        for name, tensor in found.items():
            plain = plain_name(str(name))
            if plain in stored:
                raise CheckpointError(f"{path}: expected each weight once, got {plain} again as {name}")
            if not tensor.dtype.is_floating_point:
                raise CheckpointError(f"{path}: {name}: expected floating-point values, got {tensor.dtype}")
            stored[plain] = tensor
        config = find_config(path, content, stored)
        check_shapes(path, config, stored)
        held = sum(storage.nbytes for storage in {tensor.storage for tensor in stored.values()})
        if held < (wanted := sum(tensor.nbytes for tensor in stored.values())):
            raise CheckpointError(f"{path}: expected {wanted} bytes of weights, got {held} that many share")
        weights = dict(zip(stored, archive.read_all(stored.values()), strict=True))
    for name, value in weights.items():
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: {name}: expected finite weights, got NaN or infinity among them")
    return Checkpoint(path, weights, key, config)


def plain_name(name: str) -> str:
    """Take what torch's wrappers put before and between the parts of a weight's name off it."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while parts[:1] == ["module"]:
        parts = parts[1:]
    return ".".join(parts)


def check_shapes(path: Path, config: ShuffleMixerConfig, weights: Mapping[str, HasShape]) -> None:
    """Raise CheckpointError, naming `path`, unless names and shapes are those of the network that `config` says."""
    try:
        with torch.device("meta"):  # allocates nothing
            network = ShuffleMixer.from_config(config)
    except (RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: expected a network that can be built, got {config}") from error
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    got = {name: tuple(value.shape) for name, value in weights.items()}
    misfits = [
        f"{name[:200]}: expected {expected.get(name, 'no such name')}, got {got.get(name, 'nothing')}"
        for name in sorted(expected.keys() | got.keys())
        if expected.get(name) != got.get(name)
    ]
    if misfits:
        more = f"; and {len(misfits) - 5} more" if len(misfits) > 5 else ""
        raise CheckpointError(f"{path}: not the weights of {config}: {'; '.join(misfits[:5])}{more}")


@contextmanager
def _open(path: Path) -> Iterator[Archive]:
    """Open a checkpoint, hold its checksums, and tell in one line what is wrong with it then or later."""
    try:
        with open_archive(path) as archive:
            archive.verify_checksums()  # torch writes checksums, and does not look at them
            if not isinstance(archive.content, dict):
                kind = "a tensor" if isinstance(archive.content, StoredTensor) else type(archive.content).__name__
                raise CheckpointError(f"{path}: expected a mapping of weights, got {kind}")
            yield archive
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected a checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: expected a checkpoint that can be read, got {error.strerror}") from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: expected a checkpoint that fits the memory, got {_size(path)}") from error
    except (ArchiveError, PickleError, *DAMAGE) as error:
        raise CheckpointError(
            f"{path}: expected tensors written by torch.save, got a damaged file or other content: {str(error)[:200]}"
        ) from error


def _size(path: Path) -> str:
    return f"{path.stat().st_size} bytes" if path.exists() else "more"
