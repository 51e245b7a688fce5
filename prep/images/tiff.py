"""The first directory of a TIFF file: size, tiles, and whether more pages follow (TIFF 6.0, section 2).

Pillow follows all directories to count pages, in quadratic time; all that matters here is whether there is more than
one.
"""

from dataclasses import dataclass
from typing import IO, Literal

WIDTH, HEIGHT, ORIENTATION, TILE_WIDTH, TILE_HEIGHT = 256, 257, 274, 322, 323
MAX_TAGS = 4096
_BYTES = {3: 2, 4: 4, 16: 8}  # bytes of SHORT, LONG and LONG8, by type number


@dataclass(frozen=True)
class Directory:
    """The first page: height and width with its orientation applied, as decoders do; pixels per tile (0: no tiles);
    whether more pages follow.
    """

    height: int
    width: int
    tile_pixels: int
    more_pages: bool


def read_directory(file: IO[bytes]) -> Directory:
    """Read the first directory of a TIFF or BigTIFF file.

    Raises:
        ValueError: the directory is truncated, or has no size or thousands of tags.
    """
    file.seek(0)
    start = file.read(16)
    order: Literal["little", "big"] = "little" if start[:2] == b"II" else "big"
    big = 43 in start[2:4]
    word, entry, counter = (8, 20, 8) if big else (4, 12, 2)
    file.seek(int.from_bytes(start[8:16] if big else start[4:8], order))
    count = int.from_bytes(file.read(counter), order)
    if count > MAX_TAGS:
        raise ValueError(f"its first directory has {count} tags")
    data = file.read(count * entry)
    following = file.read(word)
    tags: dict[int, int] = {}
    for at in range(0, len(data) - entry + 1, entry):
        tag, kind = (int.from_bytes(data[at + i : at + i + 2], order) for i in (0, 2))
        value = data[at + 4 + word :][: _BYTES.get(kind, 0)]
        tags.setdefault(tag, int.from_bytes(value, order))
    if len(data) < count * entry or not (tags.get(WIDTH) and tags.get(HEIGHT)):
        raise ValueError("its first directory is truncated or has no size")
    height, width = tags[HEIGHT], tags[WIDTH]
    if 5 <= tags.get(ORIENTATION, 1) <= 8:
        height, width = width, height
    return Directory(height, width, tags.get(TILE_WIDTH, 0) * tags.get(TILE_HEIGHT, 0), any(following))
