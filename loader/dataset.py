"""Datasets for torch: PatchDataset of aligned random crops, ImageDataset of whole images."""

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from loader.ahead.reader import Reader, open_reader
from loader.arguments import as_integer, describe, flag, folder_path, require, whole
from loader.epoch import REPEATED, EpochState, warn
from loader.errors import FormatError, ShardsError, one_line
from loader.format.layout import CHANNELS, HR, MAX_SIDE, Strings
from loader.pixels.shards import Shards
from loader.pixels.tiles import Pixels
from loader.plan import Crop, Plan

MAX_SAMPLES = (1 << 62) - 1  # samples in an epoch, and the last epoch
LrHr = tuple[Tensor, Tensor]


class _ShardsDataset(Dataset[LrHr]):
    """A dataset that pickles as the path and digest of its shards, and reopens them when unpickled.

    If that fails, the first use raises the error: a spawned worker can then pass it to its parent.
    """

    def __init__(self, folder: str | os.PathLike[str], scale: int) -> None:
        self._shards: Shards | str = Shards(folder_path("folder", folder))
        self._scale = whole("scale", scale, None)
        self._shards.check_scale(self._scale)
        self._opened = (self._shards.folder, self._shards.index.sha256)

    @property
    def shards(self) -> Shards:
        """The open shards."""
        if isinstance(self._shards, str):
            raise FormatError(self._shards)
        return self._shards

    @property
    def scale(self) -> int:
        """HR pixels per LR pixel along one side."""
        return self._scale

    @abstractmethod
    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[LrHr]:
        return (self[n] for n in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_shards"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        folder, sha256 = self._opened
        try:
            self._shards = Shards(folder)
            if self._shards.index.sha256 != sha256:
                self._shards = f"{folder}: expected the dataset opened before, got one built since"
        except FormatError as error:
            self._shards = str(error)


class PatchDataset(_ShardsDataset):
    """Aligned random crops: sample n is (lr, hr), uint8 RGB tensors (3, p, p) and (3, p·scale, p·scale), channels last.

    Sample n is a pure function of (seed, epoch, n), and every (image, position) pair is equally likely. Samples need
    no shuffling: read n = 0, 1, 2, … in order.

    Call `set_epoch` before each epoch to draw new crops. Drawing the same crops repeatedly, also in DataLoader
    workers, triggers one warning. A PatchLoader advances through epochs by itself.

    Args:
        folder: a dataset made by `prep build-shards`.
        scale: one of the scales it was built with.
        lr_patch: side of the LR crop in LR pixels; the HR crop is `scale` times as wide.
        length: samples per epoch; None: the total number of whole patches that fit into the images.
        seed: 0 to 2**64 - 1.
        augment: apply one of the 8 flips and quarter turns to each sample, the same to LR and HR.
        too_small: how to treat images smaller than the patch: "error", or "skip".
        fixed: always draw the crops of epoch 0, ignoring `set_epoch`, without a warning: for validation. (Does not
            affect a PatchLoader.)

    Raises:
        FormatError: the folder holds no complete dataset.
        ShardsError: the dataset lacks the scale, or images are too small for the patch.
        TypeError: an argument is of the wrong type, such as a float for an integer.
        ValueError: an argument is out of range.
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
        """Side of the LR crop in LR pixels."""
        return self._lr_patch

    @property
    def seed(self) -> int:
        """Seed of the random crops."""
        return self._seed

    @property
    def augment(self) -> bool:
        """True if crops are flipped and rotated."""
        return self._augment

    @property
    def fixed(self) -> bool:
        """True if the crops are always those of epoch 0."""
        return self._fixed

    @property
    def plan(self) -> Plan:
        """The plan: which crop is sample n of an epoch."""
        if self._plan is None:
            self._plan = Plan(*self.shards.index.sizes(self._scale), self._lr_patch, self._seed, self._augment)
        return self._plan

    @property
    def epoch(self) -> int:
        """The current epoch; 0 until `set_epoch` is called."""
        return self._state.epoch

    def set_epoch(self, epoch: int) -> None:
        """Draw the samples of an epoch (0 or more) from now on, in this process and in DataLoader workers.

        Setting the same epoch again restarts the count of repeated crops. No effect with `fixed=True`.
        """
        epoch = whole("epoch", epoch, 0, MAX_SAMPLES)
        if not self._fixed:
            self._state.epoch = epoch

    def crop(self, n: int) -> Crop:
        """Return the origin of sample n of the current epoch."""
        crops = self.plan.crops(self.epoch, [self._number(n)])
        name = self.shards.index.name[int(crops.image[0])]
        return Crop(name, int(crops.top[0]), int(crops.left[0]), int(crops.transform[0]))

    def __getitem__(self, n: int) -> LrHr:
        return self._draw([self._number(n)])[0]

    def __getitems__(self, samples: Sequence[int]) -> list[LrHr]:
        """Return several samples at once; torch's DataLoader calls this."""
        if isinstance(samples, str | bytes) or not isinstance(samples, Iterable):
            raise TypeError(f"samples: expected a sequence of whole numbers, got {describe(samples)}")
        return self._draw([self._number(n) for n in samples])

    def __contains__(self, item: object) -> bool:
        raise TypeError("PatchDataset does not support `in`: crops are drawn on demand")

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_readers": {}, "_plan": None}

    def _draw(self, samples: list[int]) -> list[LrHr]:
        if not samples:
            return []
        numbers = np.array(samples, np.int64)
        crops = self.plan.crops(self.epoch, numbers)
        reader = self._reader()
        lr, hr = (np.empty((len(crops), side, side, CHANNELS), np.uint8) for side in (reader.patch.lr, reader.patch.hr))
        reader.ask(crops)(lr, hr)
        if self._state.repeats(numbers):
            warn(REPEATED.format(folder=one_line(str(self.shards.folder)), epoch=self.epoch))
        return list(zip(channels_first(lr).unbind(), channels_first(hr).unbind(), strict=True))

    def _reader(self) -> Reader:
        """Return this process's reader: a forked process does not inherit its threads."""
        if os.getpid() not in self._readers:
            self._readers = {os.getpid(): open_reader(self.shards, self._scale, self._lr_patch)}
        return self._readers[os.getpid()]

    def _number(self, n: object) -> int:
        return _item_number("sample", n, len(self), f"a whole number, 0 to {len(self) - 1}")

    def _check_small(self, patches: NDArray[np.int64], too_small: str) -> None:
        small = np.flatnonzero(patches == 0)
        if small.size == 0 or (too_small == "skip" and small.size < len(patches)):
            return
        names = ", ".join(one_line(self.shards.index.name[int(i)]) for i in small[:5])
        more = f" and {small.size - 5} more" if small.size > 5 else ""
        side = self._lr_patch * self._scale
        raise ShardsError(
            f"{self.shards.folder}: expected images of at least {side} × {side} pixels (LR patch {self._lr_patch}, "
            f"scale {self._scale}), got {small.size} of {len(patches)} smaller: {names}{more}; "
            'too_small="skip" skips such images, as long as others remain'
        )


class ImageDataset(_ShardsDataset):
    """Whole images: an item is (lr, hr), uint8 RGB (3, h, w) and (3, h·scale, w·scale), channels last.

    Index by number or by name; `name in data` works too. HR is cropped to the part that LR covers.

    Args:
        folder: a dataset made by `prep build-shards`.
        scale: one of the scales it was built with.

    Raises:
        FormatError: the folder holds no complete dataset.
        ShardsError: the dataset lacks the scale.
        TypeError: the scale is not an integer.
    """

    def __init__(self, folder: str | os.PathLike[str], scale: int) -> None:
        super().__init__(folder, scale)
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.names)

    @property
    def names(self) -> Strings:
        """Image names in order: the stems of the source files."""
        return self.shards.index.name

    def __getitem__(self, item: int | str) -> LrHr:
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

    def __contains__(self, item: object) -> bool:
        if not isinstance(item, str):
            raise TypeError(f"image: expected a name, got {describe(item)}")
        return item in self._by_name()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_numbers": {}}

    def _number(self, item: object) -> int:
        if isinstance(item, str):
            if (found := self._by_name().get(item)) is None:
                raise KeyError(f"{self.shards.folder}: expected the name of one of {len(self)} images, got {item!r}")
            return found
        return _item_number("image", item, len(self), f"a number, 0 to {len(self) - 1}, or a name")

    def _by_name(self) -> dict[str, int]:
        if not self._numbers:
            self._numbers = {name: i for i, name in enumerate(self.names)}
        return self._numbers


def _item_number(name: str, item: object, length: int, expected: str) -> int:
    """Return the number of an item, 0 to length - 1; negative ones count from the end."""
    number = as_integer(item)
    if number is None:
        raise TypeError(f"{name}: expected {expected}, got {describe(item)}")
    if not -length <= number < length:
        raise IndexError(f"{name}: expected 0 to {length - 1}, got {describe(number)}")
    return number % length


def channels_first(images: Pixels) -> Tensor:
    """Return images (n, h, w, 3) as a channels-last tensor (n, 3, h, w), without a copy."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)
