"""What a dataset is, whatever its files are called: a digest of the pixels that training sees."""

import hashlib

from loader.format import HR, Index

_AT_ONCE = 1 << 14  # images: few enough for their lines to stay in the processor's cache


def dataset_identity(index: Index, scale: int) -> str:
    """Return the SHA-256 (hex) of what a sample stream at that scale draws from: images, in order, HR and LR.

    It covers name, height, width, and the CRC-32 of the stored HR and LR of each image, and the tiles' sides, which
    the checksums depend on. It is the same for another container, other shards, or another version of the program.
    """
    high, low = index.planes[HR], index.planes[scale]
    digest = hashlib.sha256(f"{scale} {high.tile} {low.tile}\n".encode())
    for start in range(0, len(index.name), _AT_ONCE):
        names = index.name.encoded(start, min(start + _AT_ONCE, len(index.name)))
        columns = (
            column[start : start + _AT_ONCE].tolist() for column in (index.height, index.width, high.crc32, low.crc32)
        )
        lines = [
            b"%d %b %d %d %d %d\n" % (len(name), name, height, width, hr, lr)
            for name, height, width, hr, lr in zip(names, *columns, strict=True)
        ]
        digest.update(b"".join(lines))
    return digest.hexdigest()
