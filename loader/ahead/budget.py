"""A limit in bytes on the memory of batches that are being read."""

from queue import SimpleQueue

READ_BUFFERS = 64 << 20  # bytes that positional reads of one stream may fill ahead of time


class MemoryBudget:
    """A counting semaphore in bytes: one thread acquires memory batch by batch, any thread releases it.

    At most `limit` bytes are held at a time, or two batches if those are larger: one is read while the other is
    gathered.
    """

    def __init__(self, limit: int = READ_BUFFERS) -> None:
        self.closed = False
        self._limit = limit
        self._held, self._batches = 0, 0
        self._released: SimpleQueue[int] = SimpleQueue()

    def acquire(self, size: int) -> None:
        """Wait until `size` more bytes fit, or the budget is closed."""
        while not self.closed and self._batches >= 2 and self._held + size > self._limit:
            self._held -= self._released.get()
            self._batches -= 1
        self._held += size
        self._batches += 1

    def release(self, size: int) -> None:
        """Release what was acquired for a batch."""
        self._released.put(size)

    def close(self) -> None:
        """Make every `acquire` return at once. Takes no lock, so finalisers may call it."""
        self.closed = True
        self._released.put(0)
