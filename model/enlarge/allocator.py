"""Settings of glibc's memory allocator."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
KEPT = (1 << 31) - 1  # bytes


def keep_freed_memory() -> None:
    """Let the process keep what it frees: features of many megabytes come and go with every layer.

    By default glibc returns each to the system and asks for it again, which clears it page by page: on the CPU that
    takes as long as half of the network's own work. For commands; a library leaves its process as it is.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, KEPT)
    mallopt(M_TRIM_THRESHOLD, KEPT)
