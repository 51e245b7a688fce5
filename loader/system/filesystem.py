"""Facts about storage: a folder's file system, the size limit of page advice, and whether reads still reach a disk."""

import os
import re
import resource
from pathlib import Path

# File systems that turn reads into network requests, and page faults into many small ones. The names of those based on
# FUSE (sshfs, goofys, gcsfuse, …) begin with "fuse".
NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "panfs", "pvfs2",
    "smb2", "smb3", "smbfs", "virtiofs", "wekafs",
}  # fmt: skip
DEFAULT_READ_AHEAD = 128 << 10  # bytes; Linux's default read_ahead_kb


def file_system(folder: Path) -> str:
    """Return the type of a folder's file system from the mount table, or "unknown" if there is no table."""
    try:
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return "unknown"
    # realpath resolves as far as it can, even on a dead mount.
    place, best = Path(os.path.realpath(folder)), (-1, "unknown")
    for line in table.split("\n"):
        mount, _, rest = line.partition(" - ")
        if len(mount.split(" ")) < 5 or not rest:
            continue
        # Spaces and the like are written as octal escapes (proc(5)).
        point = Path(re.sub(r"\\([0-3][0-7]{2})", lambda match: chr(int(match[1], 8)), mount.split(" ")[4]))
        if place.is_relative_to(point) and len(point.parts) >= best[0]:  # later lines are mounted on top
            best = (len(point.parts), rest.split(" ")[0])
    return best[1]


def is_network(folder: Path) -> bool:
    """Return whether the mount table says that a folder is on a network file system, or on FUSE."""
    kind = file_system(folder)
    return kind in NETWORK or kind.startswith("fuse")


def advice_limit(folder: Path) -> int:
    """Return how many bytes one MADV_WILLNEED call reads in this folder; the system ignores the rest of the range."""
    try:
        device = folder.stat().st_dev
        path = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        return max(int(path.read_text()) << 10, DEFAULT_READ_AHEAD)
    except (OSError, ValueError):
        return DEFAULT_READ_AHEAD


class StorageWatch:
    """Detects whether this process still reads from storage, from counters of the system.

    Queried once per batch. After QUIET queries without bytes read or major page faults, everything is assumed to be in
    memory. Major faults restart the count at -ALARM.
    """

    QUIET = 16
    ALARM = 32

    def __init__(self) -> None:
        self._quiet = 0
        self._seen = storage_reads()

    def storage_in_use(self) -> bool:
        """Return whether anything was read recently; True if the system has no counters."""
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
    """Return this process's major page faults and bytes read from storage, or None without counters."""
    try:
        text = Path("/proc/self/io").read_text()
    except OSError:
        return None
    counted = next((int(line.split()[1]) for line in text.splitlines() if line.startswith("read_bytes")), None)
    return None if counted is None else (resource.getrusage(resource.RUSAGE_SELF).ru_majflt, counted)
