"""Memory that a stream of batches may hold at once, counted in bytes."""

from queue import SimpleQueue

SCRATCH = 64 << 20  # bytes that positional reads of a stream's coming batches may fill


class Room:
    """Lets one thread take memory for one batch after another while it lasts; any thread gives it back.

    At most `limit` bytes are taken at a time, or two batches where those need more: one is read while another one is
    gathered.
    """

    def __init__(self, limit: int = SCRATCH) -> None:
        self.closed = False
        self._limit = limit
        self._held, self._batches = 0, 0
        self._returned: SimpleQueue[int] = SimpleQueue()

    def take(self, size: int) -> None:
        """Wait until there is room for `size` bytes more, or the room is closed."""
        while not self.closed and self._batches >= 2 and self._held + size > self._limit:
            self._held -= self._returned.get()
            self._batches -= 1
        self._held += size
        self._batches += 1

    def give(self, size: int) -> None:
        """Return what was taken for a batch."""
        self._returned.put(size)

    def close(self) -> None:
        """Let nobody wait from now on. It takes no lock: finalisers call it."""
        self.closed = True
        self._returned.put(0)
