"""The identity of a dataset: a digest of the pixels that training sees, whatever files they are in."""

import hashlib

import numpy as np

from loader.format.layout import HR, Index


def dataset_identity(index: Index, scale: int) -> str:
    """Return the SHA-256 (hex) of the images, in order, that a sample stream at this scale draws from.

    It covers each image's name, height, width, and the CRC-32 of its HR and LR, and the tile sizes, which those
    checksums depend on. It does not depend on container, shards, or version of the program.

    The hashed bytes are a line of text, the columns one after another as little-endian int64, the length of each name
    (in bytes of UTF-8, int64 too), and the names. Checkpoints store the digest, so these bytes must never change.
    """
    high, low = index.planes[HR], index.planes[scale]
    names, lengths = index.name.encoded()
    digest = hashlib.sha256(f"srshards identity 1: x{scale} {high.tile} {low.tile} {len(lengths)}\n".encode())
    for column in (index.height, index.width, high.crc32, low.crc32, lengths):
        digest.update(np.ascontiguousarray(column, "<i8"))  # type: ignore[arg-type]
    digest.update(names)
    return digest.hexdigest()
