"""The chunks of a PNG file: their checksums, and whether EXIF or text stands behind the pixels.

libpng prints what is wrong with a file and does not say which file; Pillow decodes all pixels to see whether EXIF
follows them. A walk along the chunks (PNG specification, section 5) tells both, for the cost of a CRC-32.
"""

import os
import zlib
from typing import IO

SIGNATURE = 8  # bytes
METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
MAX_CHUNKS = 1 << 20  # of the usual 8 KiB, for 8 GiB of compressed pixels
BLOCK = 1 << 20  # bytes checked at once


def metadata_behind_pixels(file: IO[bytes], check: bool) -> bool:
    """Whether there is EXIF or text after the first pixels; the place in the file stays as it was.

    Args:
        file: holds a PNG signature.
        check: hold every chunk's CRC-32 against the one written there.

    Raises:
        ValueError: a chunk has another checksum, the file ends before its last chunk, or there are too many.
    """
    before = file.tell()
    try:
        file.seek(SIGNATURE)
        return _walk(file, check)
    finally:
        file.seek(before)


def _walk(file: IO[bytes], check: bool) -> bool:
    pixels = behind = False
    for _ in range(MAX_CHUNKS):
        if len(head := file.read(8)) < 8:
            raise ValueError("it ends before its last chunk")
        length, kind = int.from_bytes(head[:4]), head[4:]
        if check:
            found = _crc32(file, length, kind)
            if file.read(4) != found:
                raise ValueError(f"chunk {kind.decode(errors='replace')} is cut or changed")
        else:
            file.seek(length + 4, os.SEEK_CUR)
        if kind == b"IEND":
            return behind
        pixels = pixels or kind == b"IDAT"
        behind = behind or (pixels and kind in METADATA)
    raise ValueError(f"it has more than {MAX_CHUNKS} chunks")


def _crc32(file: IO[bytes], length: int, kind: bytes) -> bytes:
    """The checksum of a chunk, from its data on, as it is written behind them."""
    found = zlib.crc32(kind)
    while length > 0 and (block := file.read(min(length, BLOCK))):
        found, length = zlib.crc32(block, found), length - len(block)
    return found.to_bytes(4)
