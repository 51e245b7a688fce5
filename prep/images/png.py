"""PNG chunks: their checksums, and whether EXIF or text follows the pixels.

libpng prints errors without naming the file, and Pillow decodes all pixels to see whether EXIF follows them. Walking
the chunks (PNG specification, section 5) settles both for the cost of a CRC-32.
"""

import os
import zlib
from typing import IO

SIGNATURE = 8  # bytes
METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
MAX_CHUNKS = 1 << 20  # enough for 8 GiB of compressed pixels in the usual chunks of 8 KiB
BLOCK = 1 << 20  # bytes per read


def metadata_after_pixels(file: IO[bytes], check: bool) -> bool:
    """Return whether EXIF or text follows the first pixels. The position in the file does not change.

    Args:
        file: starts with a PNG signature.
        check: compare every chunk with its CRC-32.

    Raises:
        ValueError: a checksum differs, the file ends before its last chunk, or there are too many chunks.
    """
    before = file.tell()
    try:
        file.seek(SIGNATURE)
        return _walk(file, check)
    finally:
        file.seek(before)


def _walk(file: IO[bytes], check: bool) -> bool:
    pixels = after = False
    for _ in range(MAX_CHUNKS):
        if len(head := file.read(8)) < 8:
            raise ValueError("it ends before its last chunk")
        length, kind = int.from_bytes(head[:4]), head[4:]
        if check:
            found = _crc32(file, length, kind)
            if file.read(4) != found:
                raise ValueError(f"chunk {kind.decode(errors='replace')} is truncated or changed")
        else:
            file.seek(length + 4, os.SEEK_CUR)
        if kind == b"IEND":
            return after
        pixels = pixels or kind == b"IDAT"
        after = after or (pixels and kind in METADATA)
    raise ValueError(f"it has more than {MAX_CHUNKS} chunks")


def _crc32(file: IO[bytes], length: int, kind: bytes) -> bytes:
    """Return the CRC-32 of a chunk, reading its data, as stored after it."""
    found = zlib.crc32(kind)
    while length > 0 and (block := file.read(min(length, BLOCK))):
        found, length = zlib.crc32(block, found), length - len(block)
    return found.to_bytes(4)
