"""The markers of a JPEG file (ITU-T T.81, annex B): whether it is whole, and how many scans its image has.

Not every OpenCV refuses a file that ends in the midst of its pixels (4.10 makes up the rest), and each scan takes as
long as decoding the image, so that a small file of many takes hours.
"""

import re

MAX_SCANS = 1000  # progressive files have about ten
SOI, EOI, SOS, TEM = 0xD8, 0xD9, 0xDA, 0x01
# In compressed pixels 0xFF is followed by 0 or the number of a restart.
MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)


def count_scans(data: bytes) -> int:
    """Return the number of scans of the first image in a JPEG file.

    Raises:
        ValueError: the file ends before that image does.
    """
    at = scans = 0
    while found := MARKER.search(data, at):
        kind, at = found[1][0], found.end()
        if kind == EOI:
            return scans
        scans += kind == SOS
        if kind not in (SOI, TEM):
            at += int.from_bytes(data[at : at + 2])
    raise ValueError("it ends before its image does")
