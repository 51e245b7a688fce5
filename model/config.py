"""Network configurations: the sizes of a ShuffleMixer, and the published parts that it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCALES = (2, 3, 4)
SHUFFLE_GROUPS = 8
SWITCHES = ("shuffle", "split", "fused", "norm")
EXTRA_FEATURES = 16  # channels that a block's 3x3 convolution adds


@dataclass(frozen=True)
class ShuffleMixerConfig:
    """The sizes of a network, and switches that leave out published parts for ablations.

    Raises ValueError for features that are not a multiple of 8, an even kernel size, a scale other than 2, 3, 4,
    any number below 1, or a switch that is not a bool.
    """

    features: int
    kernel_size: int
    blocks: int = 5
    mlp_ratio: int = 2
    scale: int = 4
    shuffle: bool = True  # channel shuffle after each split MLP; no effect if split is False
    split: bool = True  # MLPs on half of the channels; False: on all, features * mlp_ratio wide inside, no shuffle
    fused: bool = True  # the 3x3 and 1x1 convolutions after each pair of layers, and their skip
    norm: bool = True  # layer norm before each MLP

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in SWITCHES:
                if not isinstance(value, bool):
                    raise ValueError(f"{field.name} must be true or false, got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} must be a whole number of at least 1, got {value!r}")
        if self.features % SHUFFLE_GROUPS:
            raise ValueError(f"features must be a multiple of {SHUFFLE_GROUPS}, got {self.features}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        if self.scale not in SCALES:
            raise ValueError(f"scale must be one of {SCALES}, got {self.scale}")

    @staticmethod
    def preset(name: str, scale: int, **changes: Any) -> ShuffleMixerConfig:
        """Return the published configuration `name` ("tiny" or "base") at `scale`, with other fields set by `changes`.

        Raises ValueError for an unknown name or impossible changes.
        """
        if name not in PRESETS:
            raise ValueError(f"model must be one of {', '.join(PRESETS)}, got {name!r}")
        return dataclasses.replace(PRESETS[name], scale=scale, **changes)


PRESETS: Mapping[str, ShuffleMixerConfig] = {
    "tiny": ShuffleMixerConfig(features=32, kernel_size=3),
    "base": ShuffleMixerConfig(features=64, kernel_size=7),
}
