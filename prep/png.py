"""The chunks of a PNG file: their checksums, and whether EXIF or text stands behind the pixels.

libpng prints what is wrong with a file and does not say which file; Pillow decodes all pixels to see whether EXIF
follows them. A walk along the chunks (PNG specification, section 5) tells both, for the cost of a CRC-32.
"""

import os
import zlib
from typing import IO

SIGNATURE = 8  # bytes
METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")


def metadata_behind_pixels(file: IO[bytes], check: bool) -> bool:
    """Whether there is EXIF or text after the first pixels; the place in the file stays as it was.

    Args:
        file: holds a PNG signature.
        check: hold every chunk's CRC-32 against the one written there.

    Raises:
        ValueError: a chunk has another checksum, or the file ends before its last chunk.
    """
    before = file.tell()
    try:
        file.seek(SIGNATURE)
        return _walk(file, check)
    finally:
        file.seek(before)


def _walk(file: IO[bytes], check: bool) -> bool:
    pixels = behind = False
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4]), head[4:]
        if check:
            found = zlib.crc32(file.read(length), zlib.crc32(kind))
            if file.read(4) != found.to_bytes(4):
                raise ValueError(f"chunk {kind.decode(errors='replace')} is cut or changed")
        else:
            file.seek(length + 4, os.SEEK_CUR)
        if kind == b"IEND":
            return behind
        pixels = pixels or kind == b"IDAT"
        behind = behind or (pixels and kind in METADATA)
    raise ValueError("it ends before its last chunk")
