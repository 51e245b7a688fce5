"""JPEG markers (ITU-T T.81, annex B): whether a file is complete, and how many scans its image has.

Some OpenCV versions accept a file that ends within its pixels (4.10 makes up the rest). Each scan takes as long as
decoding the whole image, so a small file with many scans would take hours.
"""

import re

MAX_SCANS = 1000  # progressive files have about ten
SOI, EOI, SOS, TEM = 0xD8, 0xD9, 0xDA, 0x01
# In compressed pixels 0xFF is followed by 0 or a restart number.
MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)


def count_scans(data: bytes) -> int:
    """Return the number of scans of the first image in a JPEG file; ValueError if the file ends before that image."""
    at = scans = 0
    while found := MARKER.search(data, at):
        kind, at = found[1][0], found.end()
        if kind == EOI:
            return scans
        scans += kind == SOS
        if kind not in (SOI, TEM):
            at += int.from_bytes(data[at : at + 2])
    raise ValueError("it ends before its image does")
