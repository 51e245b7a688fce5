"""Memory maps that hold no descriptor, so that a dataset can have more shards than the process may have descriptors.

Python's `mmap` keeps a duplicate of the descriptor while the map exists (3.13 can omit it). libc's mmap, used here for
all versions, does not: the file can be closed once it is mapped.
"""

import ctypes
import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value


def map_file(descriptor: int, length: int) -> NDArray[np.uint8]:
    """Map the first `length` bytes of a file and return them as a read-only array; views keep the map alive.

    Raises:
        OSError: the file cannot be mapped.
    """
    return np.asarray(_Mapping(descriptor, length))


def advise(address: int, length: int, advice: int) -> None:
    """Call madvise on mapped pages with `advice` (mmap.MADV_*). The system may ignore it."""
    libc.madvise(address, length, advice)


class _Mapping:
    """A memory map, unmapped with the last array that views it; exported to numpy by its array interface."""

    def __init__(self, descriptor: int, length: int) -> None:
        address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address == _FAILED:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        self.__array_interface__: dict[str, Any] = {
            "shape": (length,),
            "typestr": "|u1",
            "data": (address, True),
            "version": 3,
        }

    def __del__(self, unmap: Callable[[int, int], int] = libc.munmap) -> None:
        if found := vars(self).get("__array_interface__"):
            unmap(found["data"][0], found["shape"][0])
