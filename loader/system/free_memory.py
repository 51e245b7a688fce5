"""How much memory there is left, before the kernel kills a process for taking more."""

import os
from collections.abc import Iterator
from pathlib import Path

SLACK = 1 << 60  # cgroups without a limit show none, or one larger than any machine


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that this process and its children may take: the machine's, or its cgroups' if less.

    Pages of files count as free, since they are dropped on demand. None: the system does not tell.
    """
    return min([*_machine(root), *_cgroups(root)], default=None)


def _machine(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _cgroups(root: Path) -> Iterator[int]:
    """What is left of each limit on the way up from this process's group (cgroups, versions 1 and 2)."""
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
            if len(numbers) == 2 and all(number.isdigit() for number in numbers) and int(numbers[0]) < SLACK:
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
