"""Statistics of a PatchLoader."""

import threading
from dataclasses import dataclass, replace

from loader.ahead.footprint import ReadCounts


@dataclass(frozen=True)
class Stats:
    """Batches returned so far, seconds their user waited for them, bytes and requests asked of storage."""

    batches: int = 0
    waited: float = 0.0
    bytes_asked: int = 0
    requests: int = 0


class SharedStats:
    """The total Stats of all iterators of a PatchLoader."""

    def __init__(self) -> None:
        self.total = Stats()
        self._guard = threading.Lock()

    def add(self, waited: float, now: ReadCounts, before: ReadCounts) -> None:
        """Count one batch, and what was requested since the previous one."""
        with self._guard:
            total = self.total
            self.total = replace(
                total,
                batches=total.batches + 1,
                waited=total.waited + waited,
                bytes_asked=total.bytes_asked + now.bytes - before.bytes,
                requests=total.requests + now.requests - before.requests,
            )
