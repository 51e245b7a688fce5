"""One shard against its index: a single pass over the file that feeds every checksum, and a look at its padding."""

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

BLOCK = 1 << 20  # bytes read at once: they are still in the processor's cache for each of the checksums
GAP = 0  # the scale of what lies between runs
ROOM, ROOM_PER_RUN = 1 << 20, 16 << 10  # bytes that may lie between runs; HDF5 takes about 1 KiB for a dataset
HOLE = 1 << 30  # bytes of a file that may be missing from the disk in one place: no image is that black


@dataclass(frozen=True)
class Finding:
    """What is wrong in a shard, in a line; `image` and `scale` where it is one plane of one image.

    With `compared` False nothing is known to be wrong: a source could not be read.
    """

    shard: int
    text: str
    image: int | None = None
    scale: int | None = None
    compared: bool = True


@dataclass(frozen=True)
class Span:
    """Bytes of a shard: the run of an image in a plane, or what lies between two (scale GAP)."""

    start: int
    stop: int
    image: int
    scale: int


@dataclass(frozen=True)
class Piece:
    """A part of a span, of whole tiles if it is of a run."""

    span: Span
    start: int
    stop: int


Tick = Callable[[], None]


def check_shard(folder: Path, index: Index, number: int, tick: Tick) -> list[Finding]:
    """Read a shard once and hold it against the index: length, SHA-256, CRC-32 of every run, and padding.

    Args:
        folder: of the dataset.
        index: the dataset's.
        number: of the shard.
        tick: is called after every plane of an image; what it raises ends the check.

    Returns: what is wrong, the shard as a whole first, then its planes in the order of their runs.
    """
    path = folder / index.shards[number].file
    findings = list(check_length(folder, index, number))
    try:
        descriptor = open_member(path)
    except OSError as error:
        return findings or [Finding(number, f"{path}: expected a readable file, got {error.strerror}")]
    try:
        return check_bytes(descriptor, path, index, number, tick, findings)
    finally:
        os.close(descriptor)


def check_bytes(
    descriptor: int, path: Path, index: Index, number: int, tick: Tick, known: Sequence[Finding] = ()
) -> list[Finding]:
    """Read an open shard once; as `check_shard`, which has looked at its length, with findings that are `known`.

    What has room for more than its runs, or a hole that none of them explains, is not read: it could be without end.
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
        whole = "" if wrong else "; all its planes are whole"
        findings.append(Finding(number, f"{path}: sha256: expected {shard.sha256}, got {check.sha256}{whole}"))
    for span, text in wrong:
        place = f"{plane_name(span.scale)} of image {index.name[span.image]!r}" if span.scale else "between runs"
        where = (span.image, span.scale) if span.scale else (None, None)
        findings.append(Finding(number, f"{path}: {place}: {text}", *where))
    return findings


def check_length(folder: Path, index: Index, number: int) -> Iterator[Finding]:
    """What is wrong with a shard that can be seen without reading it."""
    try:
        check_file(folder, index.shards[number])
    except FormatError as error:
        yield Finding(number, str(error))


def _implausible(index: Index, number: int) -> str | None:
    """Why a shard cannot be as long as recorded: what lies between runs is padding to pages, and HDF5's own data."""
    images = index.shard == number
    count = int(images.sum()) * len(index.planes)
    most = sum(int(index.run_lengths(scale)[images].sum()) for scale in index.planes) + ROOM + ROOM_PER_RUN * count
    if (length := index.shards[number].bytes) <= most:
        return None
    return f"length: expected at most {most} bytes for {count} runs, got {length} recorded"


def _sparse(descriptor: int) -> str | None:
    """The first long hole of a file, of which not a byte is on the disk, where the file system tells."""
    at, size = 0, os.fstat(descriptor).st_size
    while at < size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_HOLE)
            at = os.lseek(descriptor, start, os.SEEK_DATA) if start < size else size
        except OSError as error:
            if error.errno != errno.ENXIO:  # that is: no data up to the end
                return None
            at = size
        if at - start > HOLE:
            return f"expected a file that is all on the disk, got a hole of {at - start} bytes from byte {start} on"
    return None


def spans(index: Index, number: int) -> list[Span]:
    """The whole of a shard: its runs, and what lies between them, in order."""
    images = np.flatnonzero(index.shard == number)
    runs = []
    for scale, plane in index.planes.items():
        lengths = index.run_lengths(scale)[images].tolist()
        for image, start, length in zip(images.tolist(), plane.offset[images].tolist(), lengths, strict=True):
            runs.append(Span(start, start + length, image, scale))
    runs.sort(key=lambda span: span.start)
    whole, end = [], 0
    for run in runs:
        whole += [Span(end, run.start, -1, GAP), run] if end < run.start else [run]
        end = run.stop
    if end < (last := index.shards[number].bytes):
        whole.append(Span(end, last, -1, GAP))
    return whole


def blocks(whole: list[Span], tile_bytes: dict[int, int]) -> Iterator[list[Piece]]:
    """Cut spans into blocks to be read at once, of about BLOCK bytes, none of which ends within a tile."""
    block: list[Piece] = []
    room = BLOCK
    for span in whole:
        at = span.start
        while at < span.stop:
            unit = tile_bytes[span.scale]
            if room < unit and block:
                yield block
                block, room = [], BLOCK
            stop = min(span.stop, at + max(room // unit, 1) * unit)
            block.append(Piece(span, at, stop))
            at, room = stop, room - (stop - at)
    if block:
        yield block


class _Pass:
    """The pass over one shard."""

    def __init__(self, index: Index, number: int, tick: Tick) -> None:
        self.sha256 = ""
        self._index, self._number, self._tick = index, number, tick
        self._gaps_are_zero = index.container == "raw"
        self._tile_bytes = {scale: plane.tile**2 * CHANNELS for scale, plane in index.planes.items()} | {GAP: 1}
        self._shapes = {scale: (*index.sizes(scale), plane.tile) for scale, plane in index.planes.items()}
        self._crc = 0
        self._padded = True

    def read(self, descriptor: int) -> list[tuple[Span, str]]:
        """Read the file, and tell which spans are wrong; `sha256` is then that of what was read."""
        whole = spans(self._index, self._number)
        wrong: list[tuple[Span, str]] = []
        digest = hashlib.sha256()
        memory = memoryview(bytearray(max(BLOCK, *self._tile_bytes.values())))
        for block in blocks(whole, self._tile_bytes):
            start, length = block[0].start, block[-1].stop - block[0].start
            got = fill(descriptor, memory[:length], start)
            digest.update(memory[:got])
            for piece in block:
                text = self._check(piece, memory[piece.start - start : min(piece.stop - start, got)])
                if text is not None:
                    wrong.append((piece.span, text))
                if piece.span.scale and piece.stop == piece.span.stop:
                    self._tick()
            if got < length:  # the file ends here
                for span in whole:
                    if span.scale and span.stop > block[-1].stop:
                        wrong.append((span, _cut(span)))
                        self._tick()
                break
        self.sha256 = digest.hexdigest()
        return wrong

    def _check(self, piece: Piece, data: memoryview) -> str | None:
        """Look at one piece; what is wrong with a run is told at its end."""
        span = piece.span
        if span.scale == GAP:
            return (
                "expected zeros, got others" if self._gaps_are_zero and any_set(np.frombuffer(data, np.uint8)) else None
            )
        if piece.start == span.start:
            self._crc, self._padded = 0, True
        self._crc = zlib.crc32(data, self._crc)
        if self._padded and len(data) == piece.stop - piece.start:
            height, width, side = self._shapes[span.scale]
            tiles = np.frombuffer(data, np.uint8).reshape(-1, side, side, CHANNELS)
            first = (piece.start - span.start) // self._tile_bytes[span.scale]
            self._padded = is_padded(tiles, first, int(height[span.image]), int(width[span.image]))
        if piece.stop < span.stop:
            return None
        if len(data) < piece.stop - piece.start:
            return _cut(span)
        if self._crc != (expected := int(self._index.planes[span.scale].crc32[span.image])):
            return f"crc32: expected {expected}, got {self._crc}"
        return None if self._padded else "padding: expected zeros beyond the image's edge, got others"


def _cut(span: Span) -> str:
    return f"expected bytes {span.start} to {span.stop}, got the end of the file"


def is_padded(tiles: Pixels, first: int, height: int, width: int) -> bool:
    """Whether the tiles (n, T, T, 3) of an image from number `first` on are zero beyond its height and width."""
    side = tiles.shape[1]
    rows, cols = tiles_across(height, side), tiles_across(width, side)
    right = tiles[(cols - 1 - first) % cols :: cols, :, width - (cols - 1) * side :]
    lower = tiles[max((rows - 1) * cols - first, 0) :, height - (rows - 1) * side :]
    return not (any_set(right) or any_set(lower))


def any_set(pixels: Pixels) -> bool:
    """Whether any byte is not zero."""
    return bool(pixels.any())


def fill(descriptor: int, memory: memoryview, start: int) -> int:
    """Read the bytes of a file from `start` on; return how many there are, fewer only at its end."""
    done = 0
    while done < len(memory) and (got := os.preadv(descriptor, [memory[done:]], start + done)):
        done += got
    return done
