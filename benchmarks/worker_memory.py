"""Private memory of a DataLoader worker, less that of a process that only imports torch, in MB, as JSON.

python benchmarks/worker_memory.py DATASET BATCH_SIZE

This script imports only torch and the loader, since spawned workers import everything that their parent script imports.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from torch.utils.data import DataLoader

from loader import PatchDataset

BARE = "import torch, sys; print('ready', flush=True); sys.stdin.read()"
BATCHES = 10


def main(folder: Path, batch_size: int) -> None:
    """Print the memory of torch, and of a spawned worker with batches of that size, and of one sample."""
    alone = bare_mb(folder)
    figures = {"torch_private_mb": round(alone, 1)}
    for name, size in (("worker_private_mb", batch_size), ("worker_private_mb_single_samples", 1)):
        figures[name] = round(worker_mb(folder, size) - alone, 1)
    print(json.dumps(figures))


def bare_mb(folder: Path) -> float:
    """Return the MB of a process that imports torch."""
    with subprocess.Popen([sys.executable, "-c", BARE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        megabytes = private_mb(process.pid, folder)
        process.communicate(b"")
    return megabytes


def worker_mb(folder: Path, batch_size: int) -> float:
    """Return the MB of a worker that has opened the dataset and produced some batches."""
    data = PatchDataset(folder, 4, length=1 << 20)
    batches = iter(DataLoader(data, batch_size, num_workers=1, multiprocessing_context="spawn"))
    for _ in range(BATCHES):
        next(batches)
    return private_mb(batches._workers[0].pid, folder)  # type: ignore[attr-defined]


def private_mb(pid: int, folder: Path) -> float:
    """Return the private MB of a process, without mapped files in a folder, which are page cache."""
    kilobytes, counts = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = str(folder) not in line
        elif counts and line.startswith("Private_"):
            kilobytes += int(line.split()[1])
    return kilobytes * 1024 / 1e6


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), int(sys.argv[2]))
