"""torch datasets over shards: PatchDataset draws aligned random crops, ImageDataset gives whole images."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from loader.ahead.reader import Reader, open_reader
from loader.arguments import as_integer, describe, flag, folder_path, require, whole
from loader.epoch import EpochState, warn
from loader.errors import FormatError, ShardsError, one_line
from loader.format.layout import CHANNELS, HR, MAX_SIDE, Strings
from loader.pixels.shards import Shards
from loader.pixels.tiles import Pixels
from loader.plan import Plan

MAX_SAMPLES = (1 << 62) - 1  # in an epoch, and number of the last epoch
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Crop:
    """Where a sample comes from: the image's name, top and left in LR pixels, and one of the 8 transforms."""

    image: str
    top: int
    left: int
    transform: int


class _OfShards(Dataset[Pair]):
    """A dataset that pickles as the place of its shards, and opens them again where it is unpickled.

    Where that fails, the error is raised at the first use: a spawned worker can then hand it to its parent.
    """

    def __init__(self, folder: str | os.PathLike[str], scale: int) -> None:
        self._shards: Shards | str = Shards(folder_path("folder", folder))
        self._scale = whole("scale", scale, None)
        self._shards.need_scale(self._scale)
        self._place = (self._shards.folder, self._shards.index.sha256)

    @property
    def shards(self) -> Shards:
        """The shards, open."""
        if isinstance(self._shards, str):
            raise FormatError(self._shards)
        return self._shards

    @property
    def scale(self) -> int:
        """HR pixels per LR pixel, along one side."""
        return self._scale

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_shards"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        folder, sha256 = self._place
        try:
            self._shards = Shards(folder)
            if self._shards.index.sha256 != sha256:
                self._shards = f"{folder}: expected the dataset opened before, got one built since"
        except FormatError as error:
            self._shards = str(error)


class PatchDataset(_OfShards):
    """Aligned random crops: sample n is (lr, hr), uint8 RGB tensors (3, p, p) and (3, p·scale, p·scale).

    The tensors are views of memory with the channels last. Sample n is a pure function of (seed, epoch, n); every
    (image, position) pair is equally likely. The order is random already: read n = 0, 1, 2, … without shuffling.

    Each epoch has crops of its own, but only a call of `set_epoch` begins one. Whoever draws the same crops all over
    again gets one warning, be it in DataLoader workers. A PatchLoader goes on from epoch to epoch by itself.

    What is given here stays as it is: other values need another dataset.

    Args:
        folder: a dataset, as `prep build-shards` makes it.
        scale: one of the scales it was built with.
        lr_patch: side of the LR crop, in LR pixels; the HR crop is `scale` times as wide.
        length: samples per epoch; None: the number of whole patches that fit in the images, summed.
        seed: 0 to 2**64 - 1.
        augment: draw one of the 8 flips and quarter turns for each sample, applied alike to LR and HR.
        too_small: what to do where images are smaller than the patch: "error", or "skip" them.
        fixed: draw the crops of epoch 0 again and again, as validation does: without a warning, and whatever
            `set_epoch` says. (A PatchLoader has a stream of its own.)

    Raises:
        FormatError: the folder holds no whole dataset.
        ShardsError: there is no such scale, or images are too small for the patch.
        TypeError: an argument is of the wrong type, such as a float for a whole number.
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
        fixed: bool = False,
    ) -> None:
        self._lr_patch = whole("lr_patch", lr_patch, 1, MAX_SIDE)
        wanted = None if length is None else whole("length", length, 1, MAX_SAMPLES)
        self._seed = whole("seed", seed, 0, (1 << 64) - 1)
        self._augment, self._fixed = flag("augment", augment), flag("fixed", fixed)
        require("too_small", '"error" or "skip"', too_small, too_small in ("error", "skip"))
        super().__init__(folder, scale)
        height, width = self.shards.index.sizes(self._scale)
        patches = (height // self._lr_patch) * (width // self._lr_patch)
        self._check_small(patches, too_small)
        self._length = int(patches.sum()) if wanted is None else wanted
        self._plan: Plan | None = None
        self._readers: dict[int, Reader] = {}  # by process
        self._state = EpochState(self._length, record=not self._fixed)

    def __len__(self) -> int:
        return self._length

    @property
    def lr_patch(self) -> int:
        """Side of the LR crop."""
        return self._lr_patch

    @property
    def seed(self) -> int:
        """Seed of the draws."""
        return self._seed

    @property
    def augment(self) -> bool:
        """Whether crops are flipped and turned."""
        return self._augment

    @property
    def fixed(self) -> bool:
        """Whether the crops are those of epoch 0, always."""
        return self._fixed

    @property
    def plan(self) -> Plan:
        """Which crop is sample n of which epoch."""
        if self._plan is None:
            self._plan = Plan(*self.shards.index.sizes(self._scale), self._lr_patch, self._seed, self._augment)
        return self._plan

    @property
    def epoch(self) -> int:
        """The epoch from which samples are drawn; 0 until `set_epoch`."""
        return self._state.epoch

    def set_epoch(self, epoch: int) -> None:
        """Draw the samples of that epoch (0 or more) from now on, in this process and in DataLoader workers.

        With `fixed=True` the crops stay those of epoch 0. To say the same epoch again is to mean it: no warning counts
        what was drawn before.
        """
        epoch = whole("epoch", epoch, 0)
        require("epoch", f"at most {MAX_SAMPLES}", epoch, epoch <= MAX_SAMPLES)
        if not self._fixed:
            self._state.epoch = epoch

    def crop(self, n: int) -> Crop:
        """Where sample n of this epoch comes from."""
        crops = self.plan.crops(self.epoch, [self._number(n)])
        name = self.shards.index.name[int(crops.image[0])]
        return Crop(name, int(crops.top[0]), int(crops.left[0]), int(crops.transform[0]))

    def __getitem__(self, n: int) -> Pair:
        return self._draw([self._number(n)])[0]

    def __iter__(self) -> Iterator[Pair]:
        return (self[n] for n in range(len(self)))

    def __getitems__(self, samples: Sequence[int]) -> list[Pair]:
        """Many samples at once, as torch's DataLoader asks for them."""
        if isinstance(samples, str | bytes) or not isinstance(samples, Iterable):
            raise TypeError(f"samples: expected a sequence of whole numbers, got {describe(samples)}")
        return self._draw([self._number(n) for n in samples])

    def __contains__(self, item: object) -> bool:
        raise TypeError("a PatchDataset cannot tell what it contains: crops are drawn when they are asked for")

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_readers": {}, "_plan": None}

    def _draw(self, samples: list[int]) -> list[Pair]:
        if not samples:
            return []
        numbers = np.array(samples, np.int64)
        crops = self.plan.crops(self.epoch, numbers)
        reader = self._reader()
        lr, hr = (np.empty((len(samples), side, side, CHANNELS), np.uint8) for side in reader.sides)
        reader.ask(crops).gather(lr, hr)
        if self._state.repeats(numbers):
            warn(
                f"{one_line(str(self.shards.folder))}: the same crops are drawn again: only set_epoch begins a new "
                f"epoch, and this is still epoch {self.epoch}. Call set_epoch(epoch) on the dataset before each epoch, "
                "or read with PatchLoader, which goes on by itself; PatchDataset(..., fixed=True) says that the same "
                "crops are meant, as in validation"
            )
        return list(zip(channels_first(lr).unbind(), channels_first(hr).unbind(), strict=True))

    def _reader(self) -> Reader:
        """This process's: threads do not come along when a process forks."""
        if os.getpid() not in self._readers:
            self._readers = {os.getpid(): open_reader(self.shards, self._scale, self._lr_patch)}
        return self._readers[os.getpid()]

    def _number(self, n: object) -> int:
        number = as_integer(n)
        if number is None:
            raise TypeError(f"sample: expected a whole number, 0 to {len(self) - 1}, got {describe(n)}")
        if not -len(self) <= number < len(self):
            raise IndexError(f"samples: expected 0 to {len(self) - 1}, got {describe(number)}")
        return number % len(self)

    def _check_small(self, patches: NDArray[np.int64], too_small: str) -> None:
        small = np.flatnonzero(patches == 0)
        if small.size and (too_small == "error" or small.size == len(patches)):
            names = ", ".join(one_line(self.shards.index.name[int(i)]) for i in small[:5])
            more = f" and {small.size - 5} more" if small.size > 5 else ""
            side = self._lr_patch * self._scale
            raise ShardsError(
                f"{self.shards.folder}: expected images of at least {side} × {side} pixels (LR patch {self._lr_patch}, "
                f'scale {self._scale}), got {small.size} of {len(patches)} smaller: {names}{more}; too_small="skip" '
                "leaves such images out, as long as others remain"
            )


class ImageDataset(_OfShards):
    """Whole images: item i, or the item of that name, is (lr, hr), uint8 RGB (3, h, w) and (3, h·scale, w·scale).

    HR is cropped to the part that LR covers. The tensors are views of memory with the channels last. `name in data`
    tells whether there is an image of that name.

    Args:
        folder: a dataset, as `prep build-shards` makes it.
        scale: one of the scales it was built with.

    Raises:
        FormatError: the folder holds no whole dataset.
        ShardsError: there is no such scale.
        TypeError: the scale is no whole number.
    """

    def __init__(self, folder: str | os.PathLike[str], scale: int) -> None:
        super().__init__(folder, scale)
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.names)

    @property
    def names(self) -> Strings:
        """The images' names, in order: the stems of the files they came from."""
        return self.shards.index.name

    def __getitem__(self, item: int | str) -> Pair:
        number = self._number(item)
        try:
            lr, hr = self.shards.read(number, self._scale), self.shards.read(number, HR)
            hr = np.ascontiguousarray(hr[: lr.shape[0] * self._scale, : lr.shape[1] * self._scale])
        except MemoryError:
            height, width = (int(sizes[number]) for sizes in self.shards.index.sizes(HR))
            raise ShardsError(
                f"{self.shards.folder}: image {self.names[number]!r}: expected memory for {height} × {width} pixels, "
                "got less"
            ) from None
        return channels_first(lr[None])[0], channels_first(hr[None])[0]

    def __iter__(self) -> Iterator[Pair]:
        return (self[n] for n in range(len(self)))

    def __contains__(self, item: object) -> bool:
        if not isinstance(item, str):
            raise TypeError(f"image: expected a name to look for, got {describe(item)}")
        return item in self._by_name()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_numbers": {}}

    def _number(self, item: object) -> int:
        if isinstance(item, str):
            if (found := self._by_name().get(item)) is None:
                raise KeyError(f"{self.shards.folder}: expected the name of one of {len(self)} images, got {item!r}")
            return found
        number = as_integer(item)
        if number is None:
            raise TypeError(f"image: expected a number, 0 to {len(self) - 1}, or a name, got {describe(item)}")
        if not -len(self) <= number < len(self):
            raise IndexError(f"image: expected 0 to {len(self) - 1}, got {describe(number)}")
        return number % len(self)

    def _by_name(self) -> dict[str, int]:
        if not self._numbers:
            self._numbers = {name: i for i, name in enumerate(self.names)}
        return self._numbers


def channels_first(images: Pixels) -> Tensor:
    """(n, h, w, 3) in memory, seen as (n, 3, h, w): a channels-last tensor, without a copy."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)
