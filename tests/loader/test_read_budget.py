"""The memory of positional reads ahead of time is bounded in bytes, whatever the batch size."""

import threading
import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import build, photograph, write_image

from loader import PatchDataset, PatchLoader
from loader.ahead import positional
from loader.ahead.budget import READ_BUFFERS, MemoryBudget


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of many tiles, so that crops touch several rows of tiles."""
    folder = tmp_path_factory.mktemp("wide")
    for name in "ab":
        write_image(folder / "in" / f"{name}.png", photograph(900, 1200, ord(name)))
    return build(folder / "in", folder / "out", scales=(2,), container="raw")


@pytest.mark.parametrize("batch_size", [8, 64])
def test_positional_reads_stay_within_budget(wide: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    """Measure all memory that numpy allocates. Without the budget it would be 4 times as much here."""
    held, most = [0], [0]
    acquire, release = MemoryBudget.acquire, MemoryBudget.release

    def count(self: MemoryBudget, size: int, change: Any) -> None:
        change(self, size)
        held[0] += size if change is acquire else -size
        most[0] = max(most[0], held[0])

    monkeypatch.setattr(MemoryBudget, "acquire", lambda self, size: count(self, size, acquire))
    monkeypatch.setattr(MemoryBudget, "release", lambda self, size: count(self, size, release))
    data = PatchDataset(wide, 2, 96)
    tracemalloc.start()
    try:
        with iter(PatchLoader(data, batch_size, io="pread", readahead=1500 // batch_size)) as stream:
            for _ in islice(stream, 5):
                threading.Event().wait(0.2)  # give reads time to run ahead
            peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert READ_BUFFERS // 2 < most[0] <= READ_BUFFERS + 64 * 4 * 256**2 * 3  # one batch ahead of its release
    assert peak < READ_BUFFERS + 2 * 64 * 4 * 256**2 * 3


def test_two_batches_always_fit() -> None:
    budget = MemoryBudget(10)
    for size in (100, 200):
        budget.acquire(size)
    taken: list[int] = []
    third = threading.Thread(target=lambda: (budget.acquire(5), taken.append(5)), daemon=True)  # type: ignore[func-returns-value]
    third.start()
    third.join(0.2)
    assert not taken
    budget.release(100)
    third.join(60)
    assert taken == [5]


def test_closing_the_budget_wakes_waiters() -> None:
    budget = MemoryBudget(10)
    for size in (100, 200):
        budget.acquire(size)
    third = threading.Thread(target=lambda: budget.acquire(5), daemon=True)
    third.start()
    budget.close()
    third.join(60)
    assert not third.is_alive()
    budget.acquire(1000)


def test_small_patches_are_read_far_ahead(wide: Path) -> None:
    """The budget in bytes does not limit the read-ahead of small patches."""
    reader = positional.PositionalReader
    asked = []
    ask = reader.ask

    def counted(self: Any, crops: Any) -> Any:
        asked.append(len(crops.image))
        return ask(self, crops)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "ask", counted)
        with iter(PatchLoader(PatchDataset(wide, 2, 16), 8, io="pread", readahead=40)) as stream:
            next(stream)
            for _ in range(3000):
                if len(asked) == 43:
                    break
                threading.Event().wait(0.02)
    assert sum(asked) == 43 * 8
    assert np.all(np.array(asked) == 8)
