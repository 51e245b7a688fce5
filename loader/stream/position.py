"""Positions in a stream of samples: saved with what defines the stream, checked against it when loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loader.errors import ShardsError, one_line

MAX_POSITION = 1 << 62
_SEED_BITS = 64


@dataclass(frozen=True)
class Stream:
    """What defines a stream of samples.

    datasets: the identity of each dataset that samples are drawn from, see loader.format.identity.
    """

    length: int
    seed: int
    scale: int
    lr_patch: int
    augment: bool
    datasets: tuple[str, ...]

    def save(self, sample: int) -> dict[str, Any]:
        """Return a position in this stream as plain values, for a checkpoint."""
        return {
            "sample": sample,
            "length": self.length,
            "seed": self.seed,
            "scale": self.scale,
            "lr_patch": self.lr_patch,
            "augment": self.augment,
            "datasets": list(self.datasets),
        }

    def load(self, state: object, allow_other_dataset: bool = False) -> int:
        """Return the sample number of a saved position.

        Args:
            state: from `save`; fully validated, so it may come from an untrusted file.
            allow_other_dataset: accept a position in a stream of other datasets, even of another length.

        Raises:
            ShardsError: not a position, or one in another stream; the message names every difference.
        """
        saved, sample = _checked(state)
        differences = [
            f"{name}: expected {getattr(self, name)}, got {getattr(saved, name)}"
            for name in ("seed", "scale", "lr_patch", "augment", "length")
            if getattr(saved, name) != getattr(self, name) and not (allow_other_dataset and name == "length")
        ]
        if saved.datasets != self.datasets and not allow_other_dataset:
            ours, theirs = (" + ".join(names) for names in (self.datasets, saved.datasets))
            differences.append(f"dataset: expected {ours}, got {theirs}: other pixels, other images, or another order")
        if differences:
            raise ShardsError(f"position in the sample stream: {'; '.join(differences)}")
        return sample


def _checked(state: object) -> tuple[Stream, int]:
    """Return the stream and sample of a saved position, all types and ranges checked."""
    if not isinstance(state, Mapping):
        raise _wrong("expected a mapping, as returned by state_dict()", state)
    known = {"sample", *Stream.__dataclass_fields__}
    if missing := sorted(known - set(state)):
        raise ShardsError(f"position in the sample stream: expected {', '.join(missing)}, got none")
    if unknown := [name for name in state if name not in known]:
        raise _wrong("expected only known fields", unknown[0])
    if type(state["augment"]) is not bool:
        raise _wrong("augment: expected True or False", state["augment"])
    datasets = state["datasets"]
    if not isinstance(datasets, list | tuple) or not datasets or not all(map(_is_digest, datasets)):
        raise _wrong("datasets: expected a list of SHA-256 digests in hex", datasets)
    sample = _whole(state, "sample", 0, MAX_POSITION)
    return Stream(
        length=_whole(state, "length", 1, MAX_POSITION),
        seed=_whole(state, "seed", 0, (1 << _SEED_BITS) - 1),
        scale=_whole(state, "scale", 1, 1 << 20),
        lr_patch=_whole(state, "lr_patch", 1, 1 << 20),
        augment=state["augment"],
        datasets=tuple(datasets),
    ), sample


def _is_digest(text: object) -> bool:
    return isinstance(text, str) and len(text) == 64 and not set(text) - set("0123456789abcdef")


def _whole(state: Mapping[str, object], name: str, least: int, most: int) -> int:
    value = state[name]
    if type(value) is not int or not least <= value <= most:
        raise _wrong(f"{name}: expected a whole number from {least} to {most}", value)
    return value


def _wrong(expected: str, got: object) -> ShardsError:
    """Return an error about a value of any type and size."""
    if isinstance(got, str):
        text = one_line(ascii(got[:80]))
    elif isinstance(got, bool | float | None) or (isinstance(got, int) and got.bit_length() <= _SEED_BITS):
        text = str(got)
    else:
        text = f"a value of type {type(got).__name__}"
    return ShardsError(f"position in the sample stream: {expected}, got {text}")
