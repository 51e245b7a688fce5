"""The number of CPU threads of each rank, where several ranks share a machine."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

TORCHRUN = "TORCHELASTIC_RUN_ID"  # set by torchrun for its ranks
NAME = "OMP_NUM_THREADS"
ANCESTORS = 16  # limit on shells and wrappers between torchrun and a rank


def own_cores() -> str:
    """Return this machine's id and the cores this process may use, as text for `limit_threads`."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        machine = os.uname().nodename
    return " ".join([machine, *map(str, sorted(os.sched_getaffinity(0)))])


def limit_threads(rank: int, cores: Sequence[str]) -> None:
    """Limit torch's threads to this rank's cores, unless the user chose; `cores` holds each rank's `own_cores`."""
    if not chosen_by_user():
        torch.set_num_threads(threads_of(rank, cores))


def threads_of(rank: int, cores: Sequence[str]) -> int:
    """Return the number of cores of a rank, at least 1; a core that several ranks may use counts as a fraction."""
    machine, *mine = cores[rank].split()
    others = [set(rest) for name, *rest in map(str.split, cores) if name == machine]
    return max(1, int(sum(1 / sum(core in one for one in others) for core in mine) + 1e-6))


def chosen_by_user() -> bool:
    """True if the user set OMP_NUM_THREADS; torchrun sets it to 1 for its ranks if the user did not."""
    if os.environ.get(NAME) != "1" or TORCHRUN not in os.environ:
        return NAME in os.environ
    # Look at the environment of torchrun itself: the nearest ancestor that is not one of its ranks.
    process = os.getppid()
    for _ in range(ANCESTORS):
        try:
            names = {entry.split(b"=")[0].decode("ascii", "replace") for entry in _of(process, "environ").split(b"\0")}
            if TORCHRUN not in names:
                return NAME in names
            process = int(_of(process, "stat").rpartition(b")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
    return False


def _of(process: int, name: str) -> bytes:
    return Path(f"/proc/{process}/{name}").read_bytes()
