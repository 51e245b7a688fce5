"""Memory: how many samples a device holds at once, what is free, what ran out, and the most that was taken."""

import resource
from collections.abc import Callable
from pathlib import Path

import torch

from model.training.settings import Config

SPARE = 0.03  # of a GPU's memory: allocations of other kinds, and fragmentation, come later


def largest_part(share: int, fits: Callable[[int], bool]) -> int:
    """The largest micro-batch that fits, of those that cut a share into the fewest, nearly equal parts.

    `fits` must hold for all sizes below one for which it holds. Raises MemoryError if not even one sample fits.
    """
    few, many = 0, 1  # so many parts are too few, and so many may do
    while not fits(-(-share // many)):
        if many >= share:
            raise MemoryError(
                "expected memory for one sample at least; smaller --lr-patch or --activation-checkpointing"
            )
        few, many = many, min(2 * many, share)
    while many - few > 1:
        middle = (few + many) // 2
        if fits(-(-share // middle)):
            many = middle
        else:
            few = middle
    return -(-share // many)


def tried(step: Callable[[int], None], device: torch.device) -> Callable[[int], bool]:
    """Make a test for `largest_part` of a step that takes a number of samples: it is done, to see whether it fits."""

    def fits(samples: int) -> bool:
        try:
            step(samples)
            if device.type != "cuda":
                return True
            torch.cuda.synchronize(device)
            free, total = torch.cuda.mem_get_info(device)
            return free >= SPARE * total
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)

    return fits


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: a GPU's, or the machine's, for which torch has no type of its own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    signs = ("DefaultCPUAllocator: ", "CUDA out of memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def too_large(micro_batch: int | None, config: Config) -> str:
    """Say what did not fit, and what may."""
    return (
        f"out of memory for {micro_batch} samples of {config.lr_patch} × {config.lr_patch} LR pixels at once, in "
        f"{config.precision}; less need --micro-batch auto or a smaller number, --activation-checkpointing, "
        "--precision bf16, or a smaller --lr-patch"
    )


def free_bytes() -> int:
    """Memory that this process may still take: what the machine has available, within its control groups' limits."""
    free = 1 << 62
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = min(free, int(line.split()[1]) * 1024)
    for line in _lines(Path("/proc/self/cgroup")):  # version 2: 0::/path, version 1: 4:memory:/path
        _, _, rest = line.partition(":")
        kind, _, name = rest.partition(":")
        if kind in ("", "memory"):
            root = Path("/sys/fs/cgroup", kind)
            inner = root / name.lstrip("/")
            for group in [inner, *inner.parents][: len(inner.relative_to(root).parts) + 1]:
                free = min(free, _left(group, *(V1 if kind else V2)))
    return free


# Files of a control group: its limit, what it uses, and of that what is cached of files, and can be had back.
V2 = ("memory.max", "memory.current", "file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")


def _left(group: Path, limit: str, used: str, cached: str) -> int:
    """What a control group leaves of its limit, if it has one."""
    numbers = [*_lines(group / limit), *_lines(group / used)]
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        return 1 << 62
    found = [line.split()[1] for line in _lines(group / "memory.stat") if line.startswith(f"{cached} ")]
    return max(0, int(numbers[0]) - int(numbers[1]) + sum(map(int, found)))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def peak_bytes(device: torch.device) -> int:
    """The most memory in use so far: of a GPU by tensors, on the CPU by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
