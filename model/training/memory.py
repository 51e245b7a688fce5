"""Memory: the largest micro-batch that fits, errors of running out, and peak use."""

import resource
from collections.abc import Callable

import torch

from model.device import is_out_of_memory
from model.training.settings import Config

SPARE = 0.03  # fraction of a GPU's memory left for later allocations and fragmentation


def largest_micro_batch(samples: int, fits: Callable[[int], bool]) -> int:
    """Return the largest micro-batch that fits, of those that split `samples` into the fewest, nearly equal parts.

    `fits` must be monotonic: if a size fits, so do all smaller ones. Raises MemoryError if not even one sample fits.
    """
    few, many = 0, 1  # numbers of parts: `few` are too few, `many` may do
    while not fits(-(-samples // many)):
        if many >= samples:
            raise MemoryError(
                "out of memory for a single sample; use a smaller --lr-patch or --activation-checkpointing"
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
    """Return a predicate for `largest_micro_batch` that runs `step` on a number of samples to see if it fits."""

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


def out_of_memory_message(micro_batch: int | None, config: Config) -> str:
    """Return a message that says what did not fit and how to use less memory."""
    return (
        f"out of memory for a micro-batch of {micro_batch} samples of {config.lr_patch} × {config.lr_patch} LR pixels "
        f"in {config.precision}; use --micro-batch auto or a smaller number, --activation-checkpointing, "
        "--precision bf16, or a smaller --lr-patch"
    )


def peak_bytes(device: torch.device) -> int:
    """Return peak memory use: of tensors on a GPU, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
