"""Tuning of glibc's memory allocator."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
KEPT = (1 << 31) - 1  # bytes


def keep_freed_memory() -> None:
    """Keep freed memory in this process; a no-op with C libraries other than glibc.

    By default glibc returns large blocks to the system, and the next layer's features are cleared page by page when
    they are allocated again. On the CPU that takes half as long as the network itself. Only commands call this: a
    library should not change the allocator of its process.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(M_MMAP_THRESHOLD, KEPT)
    mallopt(M_TRIM_THRESHOLD, KEPT)
