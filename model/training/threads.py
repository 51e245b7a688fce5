"""How many threads a rank computes with, where several ranks share a machine."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

TORCHRUN = "TORCHELASTIC_RUN_ID"  # torchrun sets it for its ranks
NAME = "OMP_NUM_THREADS"
ANCESTORS = 16  # shells and wrappers between torchrun and a rank are fewer


def own_cores() -> str:
    """Name this machine, and the cores of it that this process may use, for `share_cores` of all ranks."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        machine = os.uname().nodename
    return " ".join([machine, *map(str, sorted(os.sched_getaffinity(0)))])


def share_cores(rank: int, cores: Sequence[str]) -> None:
    """Give this rank's threads their share of the machine, unless the user chose; `cores` is `own_cores` of each."""
    if not chosen_by_user():
        torch.set_num_threads(threads_of(rank, cores))


def threads_of(rank: int, cores: Sequence[str]) -> int:
    """Count the cores of a rank, each shared by the ranks that may use it too; at least 1."""
    machine, *mine = cores[rank].split()
    others = [set(rest) for name, *rest in map(str.split, cores) if name == machine]
    return max(1, int(sum(1 / sum(core in one for one in others) for core in mine) + 1e-6))


def chosen_by_user() -> bool:
    """Whether OMP_NUM_THREADS is the user's. torchrun sets it to 1 for its ranks where the user did not."""
    if os.environ.get(NAME) != "1" or TORCHRUN not in os.environ:
        return NAME in os.environ
    # What torchrun was started with tells; it is the first process up from here that is not one of its ranks.
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
