"""Memory: how many samples a device holds at once, what is free, what ran out, and the most that was taken."""

import resource
from collections.abc import Callable

import torch

from model.training.settings import Config

SPARE = 0.03  # of a GPU's memory: allocations of other kinds, and fragmentation, come later


def largest_micro_batch(samples: int, fits: Callable[[int], bool]) -> int:
    """The largest micro-batch that fits, of those that cut a samples into the fewest, nearly equal parts.

    `fits` must hold for all sizes below one for which it holds. Raises MemoryError if not even one sample fits.
    """
    few, many = 0, 1  # so many parts are too few, and so many may do
    while not fits(-(-samples // many)):
        if many >= samples:
            raise MemoryError(
                "expected memory for one sample at least; smaller --lr-patch or --activation-checkpointing"
            )
        few, many = many, min(2 * many, samples)
    while many - few > 1:
        middle = (few + many) // 2
        if fits(-(-samples // middle)):
            many = middle
        else:
            few = middle
    return -(-samples // many)


def fits_in_memory(step: Callable[[int], None], device: torch.device) -> Callable[[int], bool]:
    """Return a predicate for `largest_micro_batch`: it runs a step of so many samples to see if it fits."""

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


def out_of_memory_message(micro_batch: int | None, config: Config) -> str:
    """Say what did not fit, and what may."""
    return (
        f"out of memory for {micro_batch} samples of {config.lr_patch} × {config.lr_patch} LR pixels at once, in "
        f"{config.precision}; less need --micro-batch auto or a smaller number, --activation-checkpointing, "
        "--precision bf16, or a smaller --lr-patch"
    )


def peak_bytes(device: torch.device) -> int:
    """The most memory in use so far: of a GPU by tensors, on the CPU by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
