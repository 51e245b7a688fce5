"""Checking a shard against its index: one pass over the file computes every checksum and checks all padding."""

import errno
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loader.errors import FormatError
from loader.format.index import check_file
from loader.format.layout import CHANNELS, Index, plane_name, tiles_across
from loader.pixels.tiles import Pixels
from loader.system.safefile import open_member

BLOCK = 1 << 20  # bytes per read: few enough to stay in the CPU cache for all checksums
GAP = 0  # the level of gaps between tile runs
GAPS, GAPS_PER_RUN = 1 << 20, 16 << 10  # bytes allowed in all gaps; HDF5 takes about 1 KiB per dataset
HOLE = 1 << 30  # longest hole allowed in a file, in bytes: no image is that black


@dataclass(frozen=True)
class Finding:
    """A problem in a shard, as one line of text; `image` and `level` if it concerns one plane of one image.

    With `compared` False, a source could not be read, and nothing is known to be wrong.
    """

    shard: int
    text: str
    image: int | None = None
    level: int | None = None
    compared: bool = True


@dataclass(frozen=True)
class Segment:
    """A range of bytes in a shard: the tile run of an image in a plane, or the gap between two (level GAP)."""

    start: int
    stop: int
    image: int
    level: int


@dataclass(frozen=True)
class Piece:
    """A part of a segment, whole tiles if it is a tile run."""

    segment: Segment
    start: int
    stop: int


Tick = Callable[[], None]


def check_shard(folder: Path, index: Index, number: int, tick: Tick) -> list[Finding]:
    """Read a shard once and check it against the index: length, SHA-256, CRC-32 of every tile run, and padding.

    Args:
        folder: the dataset.
        index: its index.
        number: the number of the shard.
        tick: called after every plane of an image; an exception from it ends the check.

    Returns:
        Findings about the shard as a whole, then about its planes in the order of their tile runs.
    """
    path = folder / index.shards[number].file
    findings = list(check_length(folder, index, number))
    try:
        descriptor = open_member(path)
    except OSError as error:
        return findings or [Finding(number, f"{path}: expected a readable file, got {error.strerror}")]
    try:
        return check_open_shard(descriptor, path, index, number, tick, findings)
    finally:
        os.close(descriptor)


def check_open_shard(
    descriptor: int, path: Path, index: Index, number: int, tick: Tick, known: Sequence[Finding] = ()
) -> list[Finding]:
    """Check an open shard as `check_shard` does; `known` are the findings about its length.

    A shard far longer than its tile runs, or with a long hole, is not read: reading it might take forever.
    """
    findings, shard = list(known), index.shards[number]
    try:
        if text := _implausible(index, number) or _sparse(descriptor):
            return [*findings, Finding(number, f"{path}: {text}")]
        check = _Pass(index, number, tick)
        wrong = check.read(descriptor)
    except OSError as error:
        return findings or [Finding(number, f"{path}: expected a readable file, got {error.strerror}")]
    if not findings and check.sha256 != shard.sha256:
        intact = "" if wrong else "; all its planes are intact"
        findings.append(Finding(number, f"{path}: sha256: expected {shard.sha256}, got {check.sha256}{intact}"))
    for segment, text in wrong:
        if segment.level == GAP:
            findings.append(Finding(number, f"{path}: between runs: {text}"))
            continue
        where = f"{path}: {plane_name(segment.level)} of image {index.name[segment.image]!r}"
        findings.append(Finding(number, f"{where}: {text}", segment.image, segment.level))
    return findings


def check_length(folder: Path, index: Index, number: int) -> Iterator[Finding]:
    """Yield findings that need no reading of the shard."""
    try:
        check_file(folder, index.shards[number])
    except FormatError as error:
        yield Finding(number, str(error))


def _implausible(index: Index, number: int) -> str | None:
    """Return why a shard cannot have its recorded length, if so: gaps hold only page padding and HDF5 metadata."""
    images = index.shard == number
    count = int(images.sum()) * len(index.planes)
    most = sum(int(index.run_lengths(level)[images].sum()) for level in index.planes) + GAPS + GAPS_PER_RUN * count
    if (length := index.shards[number].bytes) <= most:
        return None
    return f"length: expected at most {most} bytes for {count} runs, got {length} recorded"


def _sparse(descriptor: int) -> str | None:
    """Return a message about the first long hole of a file, if the file system reports holes."""
    at, size = 0, os.fstat(descriptor).st_size
    while at < size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_HOLE)
            at = os.lseek(descriptor, start, os.SEEK_DATA) if start < size else size
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: no data up to the end
                return None
            at = size
        if at - start > HOLE:
            return f"expected a file that is all on the disk, got a hole of {at - start} bytes from byte {start} on"
    return None


def segments(index: Index, number: int) -> list[Segment]:
    """Return the segments of a shard, in order; they cover all its bytes."""
    images = np.flatnonzero(index.shard == number)
    runs = []
    for level, plane in index.planes.items():
        lengths = index.run_lengths(level)[images].tolist()
        for image, start, length in zip(images.tolist(), plane.offset[images].tolist(), lengths, strict=True):
            runs.append(Segment(start, start + length, image, level))
    runs.sort(key=lambda segment: segment.start)
    found, end = [], 0
    for run in runs:
        found += [Segment(end, run.start, -1, GAP), run] if end < run.start else [run]
        end = run.stop
    if end < (last := index.shards[number].bytes):
        found.append(Segment(end, last, -1, GAP))
    return found


def blocks(shard: list[Segment], tile_bytes: dict[int, int]) -> Iterator[list[Piece]]:
    """Cut segments into blocks of about BLOCK bytes to read at once; no block ends within a tile."""
    block: list[Piece] = []
    room = BLOCK
    for segment in shard:
        at = segment.start
        while at < segment.stop:
            unit = tile_bytes[segment.level]
            if room < unit and block:
                yield block
                block, room = [], BLOCK
            stop = min(segment.stop, at + max(room // unit, 1) * unit)
            block.append(Piece(segment, at, stop))
            at, room = stop, room - (stop - at)
    if block:
        yield block


class _Pass:
    """One pass over a shard."""

    def __init__(self, index: Index, number: int, tick: Tick) -> None:
        self.sha256 = ""
        self._index, self._number, self._tick = index, number, tick
        self._gaps_are_zero = index.container == "raw"
        self._tile_bytes = {level: plane.tile**2 * CHANNELS for level, plane in index.planes.items()} | {GAP: 1}
        self._shapes = {level: (*index.sizes(level), plane.tile) for level, plane in index.planes.items()}
        self._crc = 0
        self._padded = True

    def read(self, descriptor: int) -> list[tuple[Segment, str]]:
        """Read the file, set `sha256`, and return the wrong segments with the reason for each."""
        shard = segments(self._index, self._number)
        wrong: list[tuple[Segment, str]] = []
        digest = hashlib.sha256()
        memory = memoryview(bytearray(max(BLOCK, *self._tile_bytes.values())))
        for block in blocks(shard, self._tile_bytes):
            start, length = block[0].start, block[-1].stop - block[0].start
            got = fill(descriptor, memory[:length], start)
            digest.update(memory[:got])
            for piece in block:
                text = self._check(piece, memory[piece.start - start : min(piece.stop - start, got)])
                if text is not None:
                    wrong.append((piece.segment, text))
                if piece.segment.level and piece.stop == piece.segment.stop:
                    self._tick()
            if got < length:  # the file ends here
                for segment in shard:
                    if segment.level and segment.stop > block[-1].stop:
                        wrong.append((segment, _cut(segment)))
                        self._tick()
                break
        self.sha256 = digest.hexdigest()
        return wrong

    def _check(self, piece: Piece, data: memoryview) -> str | None:
        """Check one piece; return what is wrong with its segment, for tile runs at their last piece."""
        segment = piece.segment
        if segment.level == GAP:
            return (
                "expected zeros, got others" if self._gaps_are_zero and any_set(np.frombuffer(data, np.uint8)) else None
            )
        if piece.start == segment.start:
            self._crc, self._padded = 0, True
        self._crc = zlib.crc32(data, self._crc)
        if self._padded and len(data) == piece.stop - piece.start:
            height, width, side = self._shapes[segment.level]
            tiles = np.frombuffer(data, np.uint8).reshape(-1, side, side, CHANNELS)
            first = (piece.start - segment.start) // self._tile_bytes[segment.level]
            self._padded = is_padded(tiles, first, int(height[segment.image]), int(width[segment.image]))
        if piece.stop < segment.stop:
            return None
        if len(data) < piece.stop - piece.start:
            return _cut(segment)
        if self._crc != (expected := int(self._index.planes[segment.level].crc32[segment.image])):
            return f"crc32: expected {expected}, got {self._crc}"
        return None if self._padded else "padding: expected zeros beyond the image's edge, got others"


def _cut(segment: Segment) -> str:
    return f"expected bytes {segment.start} to {segment.stop}, got the end of the file"


def is_padded(tiles: Pixels, first: int, height: int, width: int) -> bool:
    """Return whether the tiles (n, T, T, 3) of an image, from tile `first` on, are zero beyond its height and width."""
    side = tiles.shape[1]
    rows, cols = tiles_across(height, side), tiles_across(width, side)
    right = tiles[(cols - 1 - first) % cols :: cols, :, width - (cols - 1) * side :]
    lower = tiles[max((rows - 1) * cols - first, 0) :, height - (rows - 1) * side :]
    return not (any_set(right) or any_set(lower))


def any_set(pixels: Pixels) -> bool:
    """Return whether any byte is not zero."""
    return bool(pixels.any())


def fill(descriptor: int, memory: memoryview, start: int) -> int:
    """Read bytes of a file from `start` on; return how many were read, fewer than asked only at its end."""
    done = 0
    while done < len(memory) and (got := os.preadv(descriptor, [memory[done:]], start + done)):
        done += got
    return done
