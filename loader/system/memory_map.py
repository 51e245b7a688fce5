"""Files mapped into memory without a descriptor of their own: a dataset may have more shards than descriptors.

Python's `mmap` duplicates the descriptor and keeps it while the mapping lives (3.13 can be told not to). So libc's is
called, in all versions alike; it leaves the descriptor to us, and we close it once the file is mapped.
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
    """The first `length` bytes of a file as a read-only array; views of it keep it mapped.

    Raises:
        OSError: the file cannot be mapped.
    """
    return np.asarray(_Mapping(descriptor, length))


def advise(address: int, length: int, advice: int) -> None:
    """Give the kernel advice (mmap.MADV_*) about mapped pages; it may not take it."""
    libc.madvise(address, length, advice)


class _Mapping:
    """A range of memory, unmapped when the last array over it is gone; numpy reads where it is from the interface."""

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
