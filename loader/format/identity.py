"""What a dataset is, whatever its files are called: a digest of the pixels that training sees."""

import hashlib

import numpy as np

from loader.format.layout import HR, Index


def dataset_identity(index: Index, scale: int) -> str:
    """Return the SHA-256 (hex) of what a sample stream at that scale draws from: images, in order, HR and LR.

    It covers name, height, width, and the CRC-32 of the stored HR and LR of each image, and the tile sizes, which
    the checksums depend on. It is the same for another container, other shards, or another version of the program.

    The bytes hashed are a line of text, then the columns one after another as little-endian int64, then the length of
    each name (UTF-8 bytes, int64 again), then the names. Checkpoints hold the digest: these bytes must never change.
    """
    high, low = index.planes[HR], index.planes[scale]
    names, lengths = index.name.encoded()
    digest = hashlib.sha256(f"srshards identity 1: x{scale} {high.tile} {low.tile} {len(lengths)}\n".encode())
    for column in (index.height, index.width, high.crc32, low.crc32, lengths):
        digest.update(np.ascontiguousarray(column, "<i8"))  # type: ignore[arg-type]
    digest.update(names)
    return digest.hexdigest()
