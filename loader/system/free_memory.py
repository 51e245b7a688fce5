"""Available memory, from the machine and its cgroups."""

import os
from collections.abc import Iterator
from pathlib import Path

NO_LIMIT = 1 << 60  # bytes: cgroups (v1) without a limit report one larger than any machine


def available_memory(root: Path = Path("/")) -> int | None:
    """Return how many bytes this process and its children may still allocate, on this machine and in its cgroups.

    The page cache counts as available. None: the system does not report it.

    Args:
        root: where /proc and /sys are; other values are for tests.
    """
    return min([*_machine(root), *_cgroups(root)], default=None)


def _machine(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _cgroups(root: Path) -> Iterator[int]:
    """Yield what is left of the limit of each cgroup (v1 and v2) from this process's up to the root."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, inner = line.split(":", 2)
        if controllers == "":
            top, limit, used, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            limit, used, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        group = top / inner.strip("/")
        for place in (group, *group.parents):
            numbers = [line for name in (limit, used) for line in _lines(place / name)]
            if len(numbers) == 2 and all(number.isdigit() for number in numbers) and int(numbers[0]) < NO_LIMIT:
                stat = dict(line.split() for line in _lines(place / "memory.stat"))
                files = sum(int(stat.get(f"{cache}{kind}_file", 0)) for kind in ("active", "inactive"))
                yield max(int(numbers[0]) - int(numbers[1]) + files, 0)
            if place == top:
                break


def _lines(path: Path) -> list[str]:
    try:
        return os.fsdecode(path.read_bytes()).splitlines()
    except OSError:
        return []
