"""What a dataset is, whatever its files are called: a digest of the pixels that training sees."""

import hashlib

from loader.format import HR, Index


def dataset_identity(index: Index, scale: int) -> str:
    """Return the SHA-256 (hex) of what a sample stream at that scale draws from: images, in order, HR and LR.

    It covers name, height, width, and the CRC-32 of the stored HR and LR of each image, and the tiles' sides, which
    the checksums depend on. It is the same for another container, other shards, or another version of the program.
    """
    high, low = index.planes[HR], index.planes[scale]
    digest = hashlib.sha256(f"{scale} {high.tile} {low.tile}\n".encode())
    columns = zip(index.height, index.width, high.crc32, low.crc32, strict=True)
    for i, (height, width, hr, lr) in enumerate(columns):
        name = index.name[i].encode()
        digest.update(b"%d %b %d %d %d %d\n" % (len(name), name, height, width, hr, lr))
    return digest.hexdigest()
