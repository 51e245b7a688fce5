"""What a folder lies on, how much the kernel reads at one word of advice, and whether it still reads at all."""

import os
import re
import resource
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
    # A mount that died does not resolve, and need not: realpath goes as far as it can.
    place, best = Path(os.path.realpath(folder)), (-1, "unknown")
    for line in table.split("\n"):
        mount, _, rest = line.partition(" - ")
        if len(mount.split(" ")) < 5 or not rest:
            continue
        # Spaces and the like are written as octal escapes (proc(5)).
        point = Path(re.sub(r"\\([0-3][0-7]{2})", lambda match: chr(int(match[1], 8)), mount.split(" ")[4]))
        if place.is_relative_to(point) and len(point.parts) >= best[0]:  # later lines are mounted over earlier ones
            best = (len(point.parts), rest.split(" ")[0])
    return best[1]


def is_network(folder: Path) -> bool:
    """Whether reads in a folder travel over a network, or through FUSE, as far as the mount table tells."""
    kind = file_system(folder)
    return kind in NETWORK or kind.startswith("fuse")


def advice_limit(folder: Path) -> int:
    """Bytes that one word of advice (MADV_WILLNEED) makes the kernel read; it drops what goes beyond."""
    try:
        device = folder.stat().st_dev
        path = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        return max(int(path.read_text()) << 10, KERNEL_DEFAULT)
    except (OSError, ValueError):
        return KERNEL_DEFAULT


class StorageWatch:
    """Tells whether this process still reads from storage, by the system's own counts.

    Looked at once a batch. After QUIET looks without a byte read nor a page fault that waited for storage, it is taken
    that all is in memory. A fault shows that it is not, and counts for longer.
    """

    QUIET = 16
    ALARM = 32

    def __init__(self) -> None:
        self._quiet = 0
        self._seen = storage_reads()

    def storage_in_use(self) -> bool:
        """Whether it was read of late; True where the system does not count."""
        seen, before = storage_reads(), self._seen
        if seen is None or before is None:
            return True
        self._seen = seen
        if seen[0] > before[0]:
            self._quiet = -self.ALARM
        elif seen[1] > before[1]:
            self._quiet = min(self._quiet, 0)
        else:
            self._quiet += 1
        return self._quiet < self.QUIET


def storage_reads() -> tuple[int, int] | None:
    """Page faults of this process that waited for storage, and bytes it had read from there; None if nobody counts."""
    try:
        text = Path("/proc/self/io").read_text()
    except OSError:
        return None
    counted = next((int(line.split()[1]) for line in text.splitlines() if line.startswith("read_bytes")), None)
    return None if counted is None else (resource.getrusage(resource.RUSAGE_SELF).ru_majflt, counted)
