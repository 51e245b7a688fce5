"""Requests to storage: exactly the bytes that crops touch, in few requests."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.ahead.footprint import PatchSize, footprint
from loader.ahead.reader import open_reader
from loader.format.layout import HR, PAGE
from loader.pixels.byte_ranges import Ranges, crop_ranges, cut, inner_pages, merged, pages
from loader.pixels.shards import Shards
from loader.pixels.tiles import transformed
from loader.plan import Plan
from loader.system import filesystem as storage

RANGES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 300_000), st.integers(1, 90_000)), max_size=30)


def ranges_of(rows: list[tuple[int, int, int]]) -> Ranges:
    shard, start, length = np.array(rows, np.int64).reshape(-1, 3).T
    return Ranges(shard, start, start + length)


def touched(ranges: Ranges) -> dict[int, set[int]]:
    """Return the set of bytes of each shard."""
    found: dict[int, set[int]] = defaultdict(set)
    for shard, start, stop in ranges:
        found[shard] |= set(range(start, stop))
    return {shard: found[shard] for shard in sorted(found)}


@settings(deadline=None, max_examples=50)
@given(rows=RANGES)
def test_merging_and_cutting_preserve_bytes(rows: list[tuple[int, int, int]]) -> None:
    ranges = ranges_of(rows)
    joined = merged(ranges)
    assert touched(joined) == touched(ranges)
    same = joined.shard[1:] == joined.shard[:-1]
    assert (joined.start[1:][same] > joined.stop[:-1][same]).all()
    assert joined.bytes == sum(map(len, touched(ranges).values()))
    pieces = cut(joined, 8192)
    assert touched(pieces) == touched(ranges)
    assert not len(pieces) or (pieces.stop - pieces.start).max() <= 8192


@given(rows=RANGES)
def test_page_rounding(rows: list[tuple[int, int, int]]) -> None:
    ranges = ranges_of(rows)
    outer, inner = pages(ranges), inner_pages(ranges)
    for some in (outer, inner):
        assert not (some.start % PAGE).any()
        assert not (some.stop % PAGE).any()
    assert ((outer.start <= ranges.start) & (outer.start > ranges.start - PAGE)).all()
    assert ((outer.stop >= ranges.stop) & (outer.stop < ranges.stop + PAGE)).all()
    assert inner.bytes <= ranges.bytes <= outer.bytes


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("patch", [1, 9, 16])
def test_ranges_are_exact(dataset: Path, scale: int, patch: int) -> None:
    """Zeroing all bytes outside the ranges changes no crop, and both ends of each range belong to a crop."""
    shards = Shards(dataset)
    size = PatchSize(scale, patch)
    crops = Plan(*shards.index.sizes(scale), patch, 3, augment=True).crops(0, np.arange(12))
    planes = size.in_planes(crops)
    for number, plane in enumerate(planes):
        zoom = (1, scale)[number]
        ranges = crop_ranges(shards.index, plane)
        out = np.empty((12, plane.side, plane.side, 3), np.uint8)
        shards.gather(plane, out)
        for k in range(12):
            image, shard = int(crops.image[k]), int(shards.index.shard[crops.image[k]])
            data = np.fromfile(dataset / shards.index.shards[shard].file, np.uint8)
            mine = crop_ranges(shards.index, size.in_planes(crops[k : k + 1])[number])
            blank = np.zeros_like(data)
            for start, stop in zip(mine.start, mine.stop, strict=True):
                assert stop - start <= plane.side * 64 * 2 * 3 * 64
                blank[start:stop] = data[start:stop]
            view = shards.tiles(image, plane.level)
            offset = int(shards.index.planes[plane.level].offset[image])
            tiles = blank[offset : offset + view.size].reshape(view.shape)
            whole = tiles.swapaxes(1, 2).reshape(view.shape[0] * view.shape[2], -1, 3)
            top, left = int(crops.top[k]) * zoom, int(crops.left[k]) * zoom
            crop = whole[top : top + plane.side, left : left + plane.side]
            np.testing.assert_array_equal(transformed(crop, int(crops.transform[k])), out[k])
            # The first and the last byte of each range belong to a pixel of the crop.
            mark = np.zeros_like(data)
            mark[mine.start] = 1
            mark[mine.stop - 1] = 1
            marked = mark[offset : offset + view.size].reshape(view.shape).swapaxes(1, 2)
            marked = marked.reshape(whole.shape)[top : top + plane.side, left : left + plane.side]
            assert marked.sum() == mark.sum() == len(np.unique([mine.start, mine.stop - 1]))
        assert ranges.bytes >= out.size
    assert len(footprint(shards.index, planes)) == sum(len(crop_ranges(shards.index, plane)) for plane in planes)
    assert [plane.level for plane in planes] == [scale, HR]


def table(*lines: str) -> str:
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("folder", "kind", "network"),
    [
        ("/data/shards", "ext4", False),
        ("/data/scratch/me", "lustre", True),
        ("/data/scratch local/me", "xfs", False),
        ("/home/me/remote", "fuse.sshfs", True),
        ("/home/me/remotely", "nfs4", True),
        ("/data/again", "tmpfs", False),
    ],
)
def test_file_systems(monkeypatch: pytest.MonkeyPatch, folder: str, kind: str, network: bool) -> None:
    mounts = table(
        "21 1 8:1 / / rw - ext4 /dev/sda1 rw",
        "22 21 0:41 / /data/scratch rw,relatime shared:7 - lustre 10.0.0.1@tcp:/scratch rw",
        "23 21 8:2 / /data/scratch\\040local rw - xfs /dev/sdb rw",
        "24 21 0:43 / /home rw - nfs4 server:/home rw",
        "25 24 0:44 / /home/me/remote rw - fuse.sshfs me@there: rw",
        "26 21 0:45 / /data/again rw - nfs server:/x rw",
        "27 26 0:46 / /data/again rw - tmpfs tmpfs rw",
    )
    monkeypatch.setattr(Path, "read_text", lambda self, **_: mounts)
    assert storage.file_system(Path(folder)) == kind
    assert storage.is_network(Path(folder)) is network


def test_missing_mount_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(self: Path, **_: str) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    assert storage.file_system(tmp_path) == "unknown"
    assert not storage.is_network(tmp_path)
    assert storage.advice_limit(tmp_path) == storage.DEFAULT_READ_AHEAD


def test_storage_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [0, 0]
    monkeypatch.setattr(storage, "storage_reads", lambda: (counts[0], counts[1]))
    watch = storage.StorageWatch()

    def looks(number: int) -> list[bool]:
        return [watch.storage_in_use() for _ in range(number)]

    for _ in range(100):  # reads continue
        counts[1] += 4096
        assert watch.storage_in_use()
    assert looks(watch.QUIET) == [True] * (watch.QUIET - 1) + [False]
    counts[1] += 4096  # another read
    assert looks(watch.QUIET + 1) == [True] * watch.QUIET + [False]
    counts[0] += 1  # a major page fault
    found = looks(watch.ALARM + watch.QUIET + 1)
    assert found == [True] * (watch.ALARM + watch.QUIET) + [False]
    monkeypatch.setattr(storage, "storage_reads", lambda: None)
    assert looks(2) == [True, True]


def test_system_read_counts() -> None:
    before = storage.storage_reads()
    if before is None:
        pytest.skip("needs read counts of the system")
    after = storage.storage_reads()
    assert after is not None
    assert all(b >= a >= 0 for a, b in zip(before, after, strict=True))


def test_cached_data_is_not_requested(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(dataset)
    crops = Plan(*shards.index.sizes(2), 16, 0, augment=True).crops(0, np.arange(8))
    monkeypatch.setattr(storage.StorageWatch, "storage_in_use", lambda self: False)
    reader = open_reader(shards, 2, 16, "mmap")
    lr, hr = np.empty((8, 16, 16, 3), np.uint8), np.empty((8, 32, 32, 3), np.uint8)
    reader.ask(crops)(lr, hr)
    assert reader.counts.requests == 0
    assert hr.any()
    monkeypatch.setattr(storage.StorageWatch, "storage_in_use", lambda self: True)
    reader.ask(crops)
    assert reader.counts.requests > 0
