"""One process among those of a run: which share of the work is its, and what all of them decide together."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import click
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from model.options import pick_device


@dataclass(frozen=True)
class Ranks:
    """This process's number, out of how many, and the device that it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """Tell of each flag whether it is set in any rank."""
        if self.world_size == 1:
            return flags
        together = torch.tensor(flags, dtype=torch.int32, device=self.device)
        distributed.all_reduce(together, distributed.ReduceOp.MAX)
        return tuple(bool(one) for one in together.tolist())

    def total(self, values: Tensor) -> Tensor:
        """Add up the tensors of all ranks, on this rank's device."""
        values = values.to(self.device, copy=True)
        if self.world_size > 1:
            distributed.all_reduce(values)
        return values

    def least(self, value: int) -> int:
        """The smallest of all ranks' numbers."""
        together = torch.tensor(value, device=self.device)
        if self.world_size > 1:
            distributed.all_reduce(together, distributed.ReduceOp.MIN)
        return int(together)

    def wrap(self, network: nn.Module) -> nn.Module:
        """Let a network's gradients be the mean over all ranks, once `backward` has ended."""
        if self.world_size == 1:
            return network
        give_strides(network)
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True)

    def together(self, network: nn.Module, last: bool) -> AbstractContextManager[None]:
        """In which to compute a part of a step: gradients are exchanged once, with the last part."""
        if isinstance(network, DistributedDataParallel) and not last:
            return network.no_sync()
        return nullcontext()


def give_strides(network: nn.Module) -> None:
    """Give gradients their weights' strides where they differ along sides of 1: DDP's buckets have them, and it warns.

    Which ones a gradient comes with depends on the device's kernels; along longer sides torch sees to it itself.
    """
    for weight in network.parameters():
        if 1 in weight.shape:

            def same(gradient: Tensor, strides: tuple[int, ...] = weight.stride()) -> Tensor:
                if gradient.stride() == strides:
                    return gradient
                return torch.empty_strided(gradient.shape, strides, dtype=gradient.dtype, device=gradient.device).copy_(
                    gradient
                )

            weight.register_hook(same)  # type: ignore[no-untyped-call]


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Take the place that RANK, LOCAL_RANK and WORLD_SIZE say, as torchrun sets them; without, be the only process.

    `device` is as for `pick_device`, "auto" and "cuda" being the GPU of the local rank. Raises click.BadParameter for
    a device that cannot be used, click.ClickException where the other ranks are not found.
    """
    world_size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    place = pick_device(device)
    if place.type == "cuda" and ":" not in device:
        gpus = torch.cuda.device_count()
        if 1 < gpus <= local:
            raise click.BadParameter(
                f"rank {local} of this machine has none of its {gpus} GPUs", param_hint="'--device'"
            )
        place = torch.device("cuda", local % gpus)  # a cluster may show each process its own GPU only
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world_size == 1:
        yield Ranks(0, 1, place)
        return
    try:
        distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise click.ClickException(f"expected to meet the other {world_size - 1} ranks, got: {reason}") from error
    try:
        yield Ranks(distributed.get_rank(), world_size, place)
    finally:
        distributed.destroy_process_group()
