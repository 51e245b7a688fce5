"""Memory for batches: reused once nothing refers to it, or page-locked for copies to a GPU."""

import sys
import threading
from collections import deque

import torch
from torch import Tensor

from loader.pixels.tiles import Pixels


class BatchBuffers:
    """A pool of memory for batches.

    Page-locked memory comes from torch's own allocator. It reuses memory only after copies to the GPU have finished,
    which it tracks by the tensor it returned: users get that very tensor.

    Args:
        pinned: allocate page-locked memory.
        spare: most arrays to keep.
    """

    def __init__(self, pinned: bool, spare: int) -> None:
        self._pinned, self._spare = pinned, spare
        self._arrays: deque[Pixels] = deque()
        self._guard = threading.Lock()

    def allocate(self, shape: tuple[int, ...]) -> tuple[Tensor, Pixels]:
        """Return a tensor (n, 3, h, w), channels last, and its pixels (n, h, w, 3), uninitialised. Thread-safe."""
        if self._pinned:
            tensor = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            return tensor.permute(0, 3, 1, 2), tensor.numpy()
        array = self._array(shape)
        return torch.from_numpy(array).permute(0, 3, 1, 2), array

    def _array(self, shape: tuple[int, ...]) -> Pixels:
        with self._guard:
            for i in range(len(self._arrays)):
                # Two references: from the deque and from this call. A tensor over the array adds one.
                if self._arrays[i].shape == shape and sys.getrefcount(self._arrays[i]) <= 2:
                    return self._arrays[i]
            array = aligned(shape)
            self._arrays.append(array)
            while len(self._arrays) > self._spare:
                self._arrays.popleft()
            return array


def aligned(shape: tuple[int, ...]) -> Pixels:
    """Return uninitialised memory that starts on a cache line: torch's does, numpy's does not."""
    memory: Pixels = torch.empty(shape, dtype=torch.uint8).numpy()
    return memory
