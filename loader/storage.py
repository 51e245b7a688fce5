"""What a folder lies on: a local disk or a network, and how much the kernel reads at one word of advice."""

import os
import re
from pathlib import Path

# Types of file systems on which a read is a message: mapped pages there are fetched in small requests. Those of FUSE
# (sshfs, goofys, gcsfuse, …) begin with "fuse".
NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "panfs", "pvfs2",
    "smb2", "smb3", "smbfs", "virtiofs", "wekafs",
}  # fmt: skip
KERNEL_DEFAULT = 128 << 10  # Linux's read_ahead_kb where nobody set it


def file_system(folder: Path) -> str:
    """The type of the file system that a folder lies on, as the mount table names it; "unknown" without a table."""
    try:
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return "unknown"
    place, best = folder.resolve(), (-1, "unknown")
    for line in table.splitlines():
        mount, _, rest = line.partition(" - ")
        # Spaces and the like are written as octal escapes (proc(5)).
        point = Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), mount.split()[4]))
        if place.is_relative_to(point) and len(point.parts) >= best[0]:  # later lines are mounted over earlier ones
            best = (len(point.parts), rest.split()[0])
    return best[1]


def is_network(folder: Path) -> bool:
    """Whether reads in a folder travel over a network, or through FUSE, as far as the mount table tells."""
    kind = file_system(folder)
    return kind in NETWORK or kind.startswith("fuse")


def advice_limit(folder: Path) -> int:
    """Bytes that one word of advice (MADV_WILLNEED) makes the kernel read; it drops what goes beyond."""
    device = folder.stat().st_dev
    path = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    try:
        return max(int(path.read_text()) << 10, KERNEL_DEFAULT)
    except (OSError, ValueError):
        return KERNEL_DEFAULT
