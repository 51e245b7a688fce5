"""Read the index of a dataset, and compare it with the files beside it, as far as memory maps need it.

What may come from elsewhere is bounded before it is read: holes let a file claim any length.
"""

import os
from pathlib import Path

from loader.errors import FormatError
from loader.format import layout as fmt
from loader.format.index_text import last_lines, parse_index
from loader.format.layout import Index, Shard
from loader.format.strict_json import fail
from loader.system.safefile import UnsafeFileError, open_member
from loader.system.sparse import stored_bytes

INDEX_ROOM = 16 << 20  # bytes that an index may have in any case,
INDEX_SHARE = 8  # and this part of its shards' bytes beyond,
INDEX_MOST = 1 << 30  # up to this, which some seven million images need
BLOCK = 1 << 20


def read_index(folder: Path) -> Index:
    """Read, check and compare with the files beside it the index of a dataset.

    Raises:
        FormatError: naming the file, the record, what was expected and what was got.
    """
    index = read_index_alone(folder)
    for shard in index.shards:
        check_file(folder, shard)
    return index


def read_index_alone(folder: Path) -> Index:
    """The index of a dataset, read and checked as far as it goes without the shards' files.

    Raises:
        FormatError: as `read_index`.
    """
    path = folder / fmt.INDEX
    try:
        return parse_index(_read_text(folder, path), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise FormatError(f"{folder}: expected a dataset, a folder with {fmt.INDEX}, got none there") from None
    except UnsafeFileError as error:
        fail(str(path), "file", "a file in this folder", error.strerror)
    except OSError as error:
        raise FormatError(f"{path}: expected a readable file, got {error.strerror}") from None
    except MemoryError:
        fail(str(path), "length", "an index that fits into memory", "one that does not")


def check_current(folder: Path, index: Index) -> None:
    """Hold that the index of a dataset is still the one that was read.

    Raises:
        FormatError: it is gone, or another.
    """
    wanted = last_lines(index.sha256)
    try:
        descriptor = open_member(folder / fmt.INDEX)
        try:
            start = max(os.fstat(descriptor).st_size - len(wanted), 0)
            if os.pread(descriptor, len(wanted) + 1, start) == wanted:
                return
        finally:
            os.close(descriptor)
    except OSError as error:
        raise FormatError(f"{folder}: expected the dataset opened before, got {error.strerror}") from None
    raise FormatError(f"{folder}: expected the dataset opened before, got one built since")


def check_file(folder: Path, shard: Shard) -> None:
    """Hold that a shard is there, a regular file of this folder, of the length recorded.

    Raises:
        FormatError: it is not.
    """
    path = folder / shard.file
    try:
        descriptor = open_member(path)
    except UnsafeFileError as error:
        fail(str(path), "file", "a file in this folder", error.strerror)
    except OSError as error:
        raise FormatError(f"{path}: expected a file of {shard.bytes} bytes, got {error.strerror}") from None
    try:
        length = os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    if length != shard.bytes:
        fail(str(path), "length", f"a file of {shard.bytes} bytes", f"{length} bytes")


def _read_text(folder: Path, path: Path) -> bytes:
    """The bytes of an index, read only as far as they can be those of one: holes in a file read as zeros."""
    descriptor = open_member(path)
    try:
        length = os.fstat(descriptor).st_size
        if length > (most := _longest(folder, length)):
            fail(str(path), "length", f"at most {most} bytes, as the shards beside it are", f"{length} bytes")
        text = bytearray()
        while len(text) <= length and (block := os.read(descriptor, BLOCK)):
            if (zero := block.find(0)) >= 0:
                fail(str(path), "text", "no zero bytes", f"one at byte {len(text) + zero}")
            text += block
        return bytes(text)
    finally:
        os.close(descriptor)


def _longest(folder: Path, length: int) -> int:
    """Bytes that an index may have: what it says of an image is far less than the image's own runs, which fill pages.

    Parsing takes up to 45 times as much memory; what came from elsewhere shall not take it all.
    """
    wanted = (min(length, INDEX_MOST) - INDEX_ROOM) * INDEX_SHARE
    data = stored_bytes(folder, "shard-", wanted) if wanted > 0 else 0
    return min(INDEX_ROOM + data // INDEX_SHARE, INDEX_MOST)
