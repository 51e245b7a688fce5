"""torch datasets over shards: PatchDataset draws aligned random crops, ImageDataset gives whole images."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from loader.arguments import need as need
from loader.format import CHANNELS, HR, ShardsError, Strings
from loader.plan import Crops, Plan
from loader.readahead import Reader, open_reader
from loader.shards import Shards
from loader.tiles import Pixels

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Crop:
    """Where a sample comes from: the image's name, top and left in LR pixels, and one of the 8 transforms."""

    image: str
    top: int
    left: int
    transform: int


class PatchDataset(Dataset[Pair]):
    """Aligned random crops: sample n is (lr, hr), uint8 RGB tensors (3, p, p) and (3, p·scale, p·scale).

    The tensors are views of memory with the channels last. Sample n is a pure function of (seed, epoch, n); every
    (image, position) pair is equally likely. The order is random already: read n = 0, 1, 2, … without shuffling.

    Args:
        folder: a dataset, as `prep build-shards` makes it.
        scale: one of the scales it was built with.
        lr_patch: side of the LR crop, in LR pixels; the HR crop is `scale` times as wide.
        length: samples per epoch; None: the number of whole patches that fit in the images, summed.
        seed: 0 to 2**64 - 1.
        augment: draw one of the 8 flips and quarter turns for each sample, applied alike to LR and HR.
        too_small: what to do where images are smaller than the patch: "error", or "skip" them.

    Raises:
        FormatError: the folder holds no whole dataset.
        ShardsError: there is no such scale, or images are too small for the patch.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        scale: int,
        lr_patch: int = 64,
        length: int | None = None,
        seed: int = 0,
        augment: bool = True,
        *,
        too_small: Literal["error", "skip"] = "error",
    ) -> None:
        need("lr_patch", "1 or more", lr_patch, lr_patch >= 1)
        need("length", "1 or more, or None", length, length is None or length >= 1)
        need("seed", "0 to 2**64 - 1", seed, 0 <= seed < 1 << 64)
        need("too_small", '"error" or "skip"', too_small, too_small in ("error", "skip"))
        self.shards = Shards(folder)
        self.shards.need_scale(scale)
        self.scale, self.lr_patch, self.seed, self.augment = scale, lr_patch, seed, augment
        height, width = self.shards.index.sizes(scale)
        patches = (height // lr_patch) * (width // lr_patch)
        self._check_small(patches, too_small)
        self._length = int(patches.sum()) if length is None else length
        self.plan = Plan(height, width, lr_patch, seed, augment)
        self._readers: dict[int, Reader] = {}  # by process
        # Shared with DataLoader workers, so that persistent ones see a new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return self._length

    @property
    def epoch(self) -> int:
        """The epoch from which samples are drawn; 0 until `set_epoch`."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw the samples of that epoch (0 or more) from now on, in this process and in DataLoader workers."""
        need("epoch", "0 or more", epoch, epoch >= 0)
        self._epoch.fill_(epoch)

    def crop(self, n: int) -> Crop:
        """Where sample n of this epoch comes from."""
        crops = self._crops([n])
        name = self.shards.index.name[int(crops.image[0])]
        return Crop(name, int(crops.top[0]), int(crops.left[0]), int(crops.transform[0]))

    def __getitem__(self, n: int) -> Pair:
        return self.__getitems__([n])[0]

    def __getitems__(self, samples: Sequence[int]) -> list[Pair]:
        """Many samples at once, as torch's DataLoader asks for them."""
        crops = self._crops(samples)
        reader = self._reader()
        lr, hr = (np.empty((len(samples), side, side, CHANNELS), np.uint8) for side in reader.sides)
        reader.ask(crops).gather(lr, hr)
        return list(zip(channels_first(lr).unbind(), channels_first(hr).unbind(), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}

    def _reader(self) -> Reader:
        """This process's: threads do not come along when a process forks."""
        if os.getpid() not in self._readers:
            self._readers[os.getpid()] = open_reader(self.shards, self.scale, self.lr_patch)
        return self._readers[os.getpid()]

    def _crops(self, samples: Sequence[int]) -> Crops:
        numbers = np.asarray(samples, np.int64)
        numbers = np.where(numbers < 0, numbers + len(self), numbers)
        if ((numbers < 0) | (numbers >= len(self))).any():
            raise IndexError(f"samples: expected 0 to {len(self) - 1}, got {list(samples)}")
        return self.plan.crops(self.epoch, numbers)

    def _check_small(self, patches: Any, too_small: str) -> None:
        small = np.flatnonzero(patches == 0)
        if small.size and (too_small == "error" or small.size == len(patches)):
            names = ", ".join(self.shards.index.name[int(i)] for i in small[:5])
            more = f" and {small.size - 5} more" if small.size > 5 else ""
            side = self.lr_patch * self.scale
            raise ShardsError(
                f"{self.shards.folder}: expected images of at least {side} × {side} pixels (LR patch {self.lr_patch}, "
                f'scale {self.scale}), got {small.size} of {len(patches)} smaller: {names}{more}; too_small="skip" '
                "leaves such images out, as long as others remain"
            )


class ImageDataset(Dataset[Pair]):
    """Whole images: item i, or the item of that name, is (lr, hr), uint8 RGB (3, h, w) and (3, h·scale, w·scale).

    HR is cropped to the part that LR covers. The tensors are views of memory with the channels last.

    Args:
        folder: a dataset, as `prep build-shards` makes it.
        scale: one of the scales it was built with.

    Raises:
        FormatError: the folder holds no whole dataset.
        ShardsError: there is no such scale.
    """

    def __init__(self, folder: str | os.PathLike[str], scale: int) -> None:
        self.shards = Shards(folder)
        self.shards.need_scale(scale)
        self.scale = scale
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.names)

    @property
    def names(self) -> Strings:
        """The images' names, in order: the stems of the files they came from."""
        return self.shards.index.name

    def __getitem__(self, item: int | str) -> Pair:
        number = self._number(item) if isinstance(item, str) else range(len(self))[item]
        lr, hr = self.shards.read(number, self.scale), self.shards.read(number, HR)
        hr = np.ascontiguousarray(hr[: lr.shape[0] * self.scale, : lr.shape[1] * self.scale])
        return channels_first(lr[None])[0], channels_first(hr[None])[0]

    def _number(self, name: str) -> int:
        if not self._numbers:
            self._numbers = {name: i for i, name in enumerate(self.names)}
        if name not in self._numbers:
            raise KeyError(f"{self.shards.folder}: expected the name of one of {len(self)} images, got {name!r}")
        return self._numbers[name]


def channels_first(images: Pixels) -> Tensor:
    """(n, h, w, 3) in memory, seen as (n, 3, h, w): a channels-last tensor, without a copy."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)
