"""The ZIP archive that `torch.save` writes, checked before any tensor is allocated: it may come from a stranger.

Its records are uncompressed: one pickle, and one record for each storage of values. `Archive` refuses what torch does
not write (compression, overlaps, wrong checksums). It reads tensors only on request, so that callers can compare their
descriptions with what they expect first.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loader.errors import ShardsError
from loader.system.safefile import open_named
from model.torchfile.stored import Storage, StoredTensor
from model.torchfile.unpickle import MAX_BYTES, read_pickle

MAX_FILE = 1 << 30  # bytes; a training checkpoint has 16 for each parameter
LOCAL_HEADER = 30  # bytes before a record's name
CHUNK = 1 << 20
ENCRYPTED = 1
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # start of files by torch before 1.6


class ArchiveError(ShardsError):
    """A file that `torch.save` did not write, or that was damaged since."""


class _Bounded(io.FileIO):
    """A file with limited reads: zipfile reads the directory of an archive at once, however large it claims to be."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > MAX_BYTES:
            raise ArchiveError(f"expected an archive directory of at most {MAX_BYTES} bytes, got {size}")
        return super().read(max(size, 0)) or b""


class Archive:
    """An open `torch.save` file: its `content`, with a StoredTensor in place of each tensor."""

    def __init__(self, file: _Bounded) -> None:
        self._zip = zipfile.ZipFile(file)
        self._records = _records(self._zip, os.fstat(file.fileno()).st_size)
        pickles = [name for name in self._records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise ArchiveError(f"expected one data.pkl, got {len(pickles)}")
        self._folder = pickles[0].removesuffix("data.pkl")
        if self._small("byteorder", b"little") != b"little":
            raise ArchiveError("expected little-endian values, got big-endian ones")
        self.content: Any = read_pickle(self._small("data.pkl"))

    def read(self, tensor: StoredTensor) -> Tensor:
        """Read a tensor onto the CPU, with the strides of the file and memory of its own."""
        return self.read_all([tensor])[0]

    def read_all(self, tensors: Iterable[StoredTensor]) -> list[Tensor]:
        """Read tensors onto the CPU; tensors that share a storage in the file share memory.

        Raises ArchiveError if a record's size is not that of its storage, or its checksum is wrong.
        """
        storages: dict[Storage, Tensor] = {}
        read = []
        for tensor in tensors:
            if tensor.storage not in storages:
                storages[tensor.storage] = self._values(tensor.storage)
            read.append(storages[tensor.storage].as_strided(tensor.shape, tensor.stride, tensor.offset))
        return read

    def read_content(self) -> Any:
        """Return `content` with every StoredTensor replaced by its tensor; raises as `read_all` does."""
        stored: dict[int, StoredTensor] = {}
        _collect_tensors(self.content, stored)
        return _with_tensors(self.content, dict(zip(stored, self.read_all(stored.values()), strict=True)))

    def verify_checksums(self) -> None:
        """Verify the checksums of all records, in chunks; ArchiveError if one is wrong."""
        for name in self._records:
            for _ in self._chunks(name):
                pass

    def _values(self, storage: Storage) -> Tensor:
        name = f"{self._folder}data/{storage.key}"
        size = self._records[name].file_size if name in self._records else None
        if size != storage.nbytes:
            raise ArchiveError(
                f"expected a record of {storage.nbytes} bytes for storage {storage.key[:40]}, got {size}"
            )
        values = bytearray(storage.nbytes)
        at = 0
        for chunk in self._chunks(name):
            values[at : at + len(chunk)] = chunk
            at += len(chunk)
        if not values:
            return torch.empty(0, dtype=storage.dtype)
        if storage.dtype == torch.bool:  # bytes other than 0 and 1 are not valid bools
            return torch.frombuffer(values, dtype=torch.uint8) != 0
        return torch.frombuffer(values, dtype=storage.dtype)

    def _small(self, name: str, missing: bytes | None = None) -> bytes:
        info = self._records.get(self._folder + name)
        if info is None and missing is not None:
            return missing
        if info is None or info.file_size > MAX_BYTES:
            raise ArchiveError(f"expected {name} of at most {MAX_BYTES} bytes")
        return b"".join(self._chunks(self._folder + name))

    def _chunks(self, name: str) -> Iterator[bytes]:
        info = self._records[name]
        with self._zip.open(info) as record:
            done, crc = 0, 0
            while chunk := record.read(CHUNK):
                done, crc = done + len(chunk), zlib.crc32(chunk, crc)
                yield chunk
        if done != info.file_size or crc != info.CRC:
            raise ArchiveError(f"{info.filename} is damaged")


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open a `torch.save` file; symbolic links are followed.

    Raises:
        ArchiveError, PickleError, ValueError, zipfile.BadZipFile, NotImplementedError, EOFError: not a `torch.save`
            file, or a damaged one.
        OSError: the file cannot be opened or read.
    """
    with _Bounded(open_named(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE:
            raise ArchiveError(f"expected at most {MAX_FILE} bytes, got {size}")
        if file.read(len(LEGACY)).startswith(LEGACY):
            raise ArchiveError("expected the format of torch 1.6 or later, got an older one; save it again")
        file.seek(0)
        yield Archive(file)


def _records(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Return the records of an archive by name, checked to be uncompressed and not to overlap."""
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    ends = [*(info.header_offset for info in infos[1:]), min(archive.start_dir, size)]
    for info, end in zip(infos, ends, strict=True):
        if (
            info.compress_type != zipfile.ZIP_STORED
            or info.flag_bits & ENCRYPTED
            or info.compress_size != info.file_size
        ):
            raise ArchiveError("expected uncompressed records, got compressed or encrypted ones")
        if info.header_offset < 0 or info.header_offset + LOCAL_HEADER + info.file_size > end:
            raise ArchiveError("expected separate records, got overlapping ones")
    records = {info.filename: info for info in infos}
    if len(records) != len(infos):
        raise ArchiveError("expected records with unique names, got a duplicate")
    return records


def _collect_tensors(value: Any, found: dict[int, StoredTensor]) -> None:
    """Collect the tensors in nested containers, whose depth and number `read_pickle` has limited."""
    if isinstance(value, StoredTensor):
        found[id(value)] = value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            _collect_tensors(inner, found)


def _with_tensors(value: Any, read: Mapping[int, Tensor]) -> Any:
    """Copy nested containers, replacing descriptions of tensors by the tensors read."""
    if isinstance(value, StoredTensor):
        return read[id(value)]
    if isinstance(value, dict):
        return {key: _with_tensors(inner, read) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_tensors(inner, read) for inner in value)
    return value
