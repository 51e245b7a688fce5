"""Memory for batches: taken again once nobody refers to it, or page-locked, for copies to a GPU."""

import sys
import threading
from collections import deque

import torch
from torch import Tensor

from loader.pixels.tiles import Pixels


class BatchBuffers:
    """Memory for batches of one stream after another.

    Page-locked memory is left to torch's own allocator: it knows when a copy to the GPU has ended, as long as it sees
    the tensor that it gave. So that very tensor goes to the user.

    Args:
        pinned: give page-locked memory.
        spare: arrays to keep at most.
    """

    def __init__(self, pinned: bool, spare: int) -> None:
        self._pinned, self._spare = pinned, spare
        self._arrays: deque[Pixels] = deque()
        self._guard = threading.Lock()

    def allocate(self, shape: tuple[int, ...]) -> tuple[Tensor, Pixels]:
        """A tensor (n, 3, h, w), channels last, and its pixels (n, h, w, 3) of any content; any thread may ask."""
        if self._pinned:
            tensor = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            return tensor.permute(0, 3, 1, 2), tensor.numpy()
        array = self._array(shape)
        return torch.from_numpy(array).permute(0, 3, 1, 2), array

    def _array(self, shape: tuple[int, ...]) -> Pixels:
        with self._guard:
            for i in range(len(self._arrays)):
                # Two references: that of the deque, and that of the call. A tensor over the array adds one.
                if self._arrays[i].shape == shape and sys.getrefcount(self._arrays[i]) <= 2:
                    return self._arrays[i]
            array = aligned(shape)
            self._arrays.append(array)
            while len(self._arrays) > self._spare:
                self._arrays.popleft()
            return array


def aligned(shape: tuple[int, ...]) -> Pixels:
    """Memory of any content that starts on a cache line, as torch gives it; numpy's does not."""
    memory: Pixels = torch.empty(shape, dtype=torch.uint8).numpy()
    return memory
