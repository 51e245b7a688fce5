"""Checkpoints, ours and published ones: weights read from a file, and the network that they fit."""

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

MIN_BLOCK_WEIGHTS = 20  # two layers, each of five convolutions with biases
# What zipfile and torch raise for damaged files.
DAMAGE = (ValueError, zipfile.BadZipFile, NotImplementedError, EOFError, OverflowError, struct.error)
WEIGHT_KEYS = {"ema": ("params_ema", "params"), "raw": ("params", "params_ema")}


class CheckpointError(ShardsError):
    """A checkpoint that cannot be used; the message is one line."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class HasShape(Protocol):
    """A tensor, or the description of one."""

    @property
    def shape(self) -> Sequence[int]:
        """Its size in each dimension."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights by their published names, and the configuration of the network that they fit."""

    path: Path
    weights: Mapping[str, Tensor]
    weights_key: str  # "params_ema", "params", or "bare" if the file is a single state dict
    config: ShuffleMixerConfig

    def build(self) -> ShuffleMixer:
        """Return the network with these weights; CheckpointError if a name or shape differs."""
        check_shapes(self.path, self.config, self.weights)
        network = ShuffleMixer.from_config(self.config)
        network.load_state_dict(self.weights)  # converts to float32
        return network


def infer_config(weights: Mapping[str, HasShape]) -> ShuffleMixerConfig:
    """Return the configuration that names and shapes of weights imply; `shuffle`, which leaves no trace, is True.

    Raises KeyError for a missing weight, and ValueError or IndexError for shapes that no network has.
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
    if len(weights) < MIN_BLOCK_WEIGHTS * blocks:
        raise ValueError(f"{blocks} blocks must have at least {MIN_BLOCK_WEIGHTS} weights each, got {len(weights)}")
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
    """Return the configuration of a checkpoint's network: its `network` entry, or else what its weights imply.

    `network` maps the fields of `ShuffleMixerConfig` to values. Raises CheckpointError, naming `path`, if it is
    malformed or contradicts the weights, or if these are not the weights of such a network.
    """
    try:
        inferred = infer_config(weights)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: not the weights of a ShuffleMixer; missing or wrong: {error}") from error
    if (fields := content.get("network")) is None:
        return inferred
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
        if name != "shuffle" and getattr(config, name) != getattr(inferred, name):
            raise CheckpointError(
                f"{path}: network: the weights have {name} {getattr(inferred, name)}, got {getattr(config, name)}"
            )
    return config


def read_raw(path: Path) -> Mapping[str, Any]:
    """Read the mapping in a `torch.save` file onto the CPU; CheckpointError if it holds something else.

    The file cannot run code, nor take more memory than it has bytes: see `model.torchfile`. Tensors that share a
    storage in the file share memory.
    """
    with _open(path) as archive:
        content: Mapping[str, Any] = archive.read_content()
        return content


def load_checkpoint(path: Path, prefer: Literal["ema", "raw"] = "ema") -> Checkpoint:
    """Read a checkpoint: ours, BasicSR's (`params`, `params_ema`), or a bare state dict.

    `prefer` chooses between raw and averaged weights in a file that holds both. `find_config` finds the configuration.
    Prefixes that DataParallel and torch.compile add to names are removed. Every name and shape is compared with the
    network's before anything is allocated. Raises CheckpointError.
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
            bare = without_wrappers(str(name))
            if bare in stored:
                raise CheckpointError(f"{path}: expected each weight once, got {bare} again as {name}")
            if not tensor.dtype.is_floating_point:
                raise CheckpointError(f"{path}: {name}: expected floating-point values, got {tensor.dtype}")
            stored[bare] = tensor
        config = find_config(path, content, stored)
        check_shapes(path, config, stored)
        held = sum(storage.nbytes for storage in {tensor.storage for tensor in stored.values()})
        if held < (wanted := sum(tensor.nbytes for tensor in stored.values())):
            raise CheckpointError(f"{path}: expected {wanted} bytes of weights, got {held}, shared between them")
        weights = dict(zip(stored, archive.read_all(stored.values()), strict=True))
    for name, value in weights.items():
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: {name}: expected finite weights, got NaN or infinity among them")
    return Checkpoint(path, weights, key, config)


def without_wrappers(name: str) -> str:
    """Return a weight's name without the parts that DataParallel and torch.compile add."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while parts[:1] == ["module"]:
        parts = parts[1:]
    return ".".join(parts)


def check_shapes(path: Path, config: ShuffleMixerConfig, weights: Mapping[str, HasShape]) -> None:
    """Check that names and shapes are those of the network of `config`; CheckpointError, naming `path`, if not."""
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
    """Open a checkpoint and verify its checksums; errors, also in the body of `with`, become CheckpointError."""
    try:
        with open_archive(path) as archive:
            archive.verify_checksums()  # torch writes checksums but never verifies them
            if not isinstance(archive.content, dict):
                kind = "a tensor" if isinstance(archive.content, StoredTensor) else type(archive.content).__name__
                raise CheckpointError(f"{path}: expected a mapping of weights, got {kind}")
            yield archive
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected a checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: expected a checkpoint that can be read, got {error.strerror}") from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: expected a checkpoint that fits in memory, got {_size(path)}") from error
    except (ArchiveError, PickleError, *DAMAGE) as error:
        raise CheckpointError(
            f"{path}: expected tensors written by torch.save, got a damaged file or other content: {str(error)[:200]}"
        ) from error


def _size(path: Path) -> str:
    return f"{path.stat().st_size} bytes" if path.exists() else "more"
