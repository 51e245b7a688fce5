"""One process among those of a run: which share of the work is its, and what all of them decide together."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import click
import torch
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from loader.errors import ShardsError, one_line
from model.checkpoints import CheckpointError
from model.device import pick_device
from model.training.threads import own_cores, share_cores


class RanksError(ShardsError):
    """Ranks that do not agree, or of which one failed: the message says which, and why."""


# What may happen to a run; all else is a mistake in the program, and shows where it was made.
FAILURES = (ShardsError, CheckpointError, click.ClickException, MemoryError, OSError)


@dataclass(frozen=True)
class Ranks:
    """This process's number, out of how many, and the device that it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, speaks and decides."""
        return self.rank == 0

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """Tell of each flag whether it is set in any rank."""
        if self.world_size == 1:
            return flags
        together = torch.tensor(flags, dtype=torch.int32, device=self.device)
        distributed.all_reduce(together, distributed.ReduceOp.MAX)
        return tuple(bool(one) for one in together.tolist())

    def broadcast_flag(self, flag: bool) -> bool:
        """Give the first rank's flag to all."""
        return self.any_of(self.first and flag)[0]

    def sum(self, values: Tensor) -> Tensor:
        """Add up the tensors of all ranks, on this rank's device."""
        values = values.to(self.device, copy=True)
        if self.world_size > 1:
            distributed.all_reduce(values)
        return values

    def minimum(self, value: int) -> int:
        """The smallest of all ranks' numbers."""
        together = torch.tensor(value, device=self.device)
        if self.world_size > 1:
            distributed.all_reduce(together, distributed.ReduceOp.MIN)
        return int(together)

    def gather(self, text: str) -> list[str]:
        """Give the texts of all ranks, in order."""
        if self.world_size == 1:
            return [text]
        data = text.encode("utf-8", "backslashreplace")
        sizes = [torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(self.world_size)]
        distributed.all_gather(sizes, torch.tensor(len(data), device=self.device))
        padded = torch.zeros(max(map(int, sizes)) + 1, dtype=torch.uint8, device=self.device)
        padded[: len(data)] = _tensor(data)
        texts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(texts, padded)
        return [_bytes(one[: int(size)]).decode() for one, size in zip(texts, sizes, strict=True)]

    def broadcast(self, data: bytes) -> bytes:
        """Give the first rank's bytes to all."""
        if self.world_size == 1:
            return data
        size = torch.tensor(len(data), device=self.device)
        distributed.broadcast(size, 0)
        tensor = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.first:
            tensor[:] = _tensor(data)
        distributed.broadcast(tensor, 0)
        return _bytes(tensor)

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """In which to do what may fail in some ranks, and must not leave others waiting: then all of them end.

        The first rank raises its own error, or a RanksError that gives another's; the others end without a word. In
        the block no rank may wait for another.
        """
        failure: Exception | None = None
        try:
            yield
        except FAILURES as error:
            if self.world_size == 1:
                raise
            failure = error
        self.raise_together(failure)

    def raise_together(self, failure: Exception | None) -> None:
        """End all ranks if one of them failed, as `fail_together` does; all must call it."""
        texts = self.gather("" if failure is None else describe_error(failure))
        if not any(texts):
            return
        if self.first:
            rank, text = next((rank, text) for rank, text in enumerate(texts) if text)
            raise failure or RanksError(f"rank {rank}: {text}")
        raise SystemExit(getattr(failure, "exit_code", 1)) from failure

    def require_equal(self, what: str, text: str) -> None:
        """End all ranks with a RanksError by the first, unless all give the same text, of one line or more."""
        texts = self.gather(text)
        for rank, other in enumerate(texts):
            if other == texts[0]:
                continue
            ours, theirs = (one.split("\n") for one in (texts[0], other))
            a, b = next((a, b) for a, b in zip([*ours, "nothing"], [*theirs, "nothing"], strict=False) if a != b)
            failure = RanksError(f"{what}: expected the same in all ranks, got {a} in rank 0 and {b} in rank {rank}")
            self.raise_together(failure)

    def wrap(self, network: nn.Module) -> nn.Module:
        """Let a network's gradients be the mean over all ranks, once `backward` has ended."""
        if self.world_size == 1:
            return network
        match_gradient_strides(network)
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True)

    def gradient_sync(self, network: nn.Module, last: bool) -> AbstractContextManager[None]:
        """In which to compute a part of a step: gradients are exchanged once, with the last part."""
        if isinstance(network, DistributedDataParallel) and not last:
            return network.no_sync()
        return nullcontext()


def match_gradient_strides(network: nn.Module) -> None:
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
def join_ranks(device: str) -> Iterator[Ranks]:
    """Take the place that RANK, LOCAL_RANK and WORLD_SIZE say, as torchrun sets them; without, be the only process.

    `device` is as for `pick_device`, "auto" and "cuda" being the GPU of the local rank. Raises click.BadParameter for
    a device that cannot be used, click.ClickException where the other ranks are not found, or one is lost.
    """
    world_size, local = (_number(name, default) for name, default in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if world_size == 1:
        yield Ranks(0, 1, local_device(device, local))
        return
    try:
        ranks = _meet(device, local)
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise click.ClickException(f"expected to meet the other {world_size - 1} ranks, got: {reason}") from error
    try:
        share_cores(ranks.rank, ranks.gather(own_cores()))
        yield ranks
    except RuntimeError as error:
        if not _is_lost_rank(error):
            raise
        raise click.ClickException(f"rank {ranks.rank}: lost the other ranks; one that failed says why") from error
    finally:
        distributed.destroy_process_group()


def local_device(name: str, local: int) -> torch.device:
    """Give the device called `name` to a local rank, each GPU being touched by its own rank only."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if 1 < gpus <= local:
            raise click.BadParameter(
                f"rank {local} of this machine has none of its {gpus} GPUs", param_hint="'--device'"
            )
        name = f"cuda:{local % gpus}"  # a cluster may show each process its own GPU only
    device = pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def describe_error(error: Exception) -> str:
    """Say in one line what an error says."""
    if isinstance(error, click.ClickException):
        return one_line(error.format_message())
    if isinstance(error, OSError) and error.filename is not None:
        return one_line(f"{os.fsdecode(error.filename)}: {error.strerror}")
    if isinstance(error, MemoryError):
        return one_line(str(error)) or "out of memory"
    return one_line(str(error)) or type(error).__name__


def _meet(device: str, local: int) -> Ranks:
    """Meet the other ranks; they tell each other of their devices first, since one without a GPU would hang all."""
    store, rank, world_size = next(rendezvous("env://"))
    place, problem = None, ""
    try:
        place = local_device(device, local)
    except click.ClickException as error:
        problem = describe_error(error)
    store.set(f"srshards/{rank}", f"{place.type if place else ''} {problem}")
    said = [store.get(f"srshards/{number}").decode().partition(" ") for number in range(world_size)]
    for number, (kind, _, trouble) in enumerate(said):
        if trouble or kind != said[0][0]:
            text = trouble or f"expected a device of one kind in all ranks, got {said[0][0]} in rank 0, {kind} here"
            store.set(f"srshards/read/{rank}", "")
            if rank:
                raise SystemExit(2)
            for other in range(world_size):  # the store is rank 0's: it stays until all have read
                store.get(f"srshards/read/{other}")
            raise click.UsageError(f"--device {device}: rank {number}: {text}")
    assert place is not None
    backend = "nccl" if place.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return Ranks(rank, world_size, place)


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise click.UsageError(f"{name}: expected a whole number, got {os.environ[name]!r}") from None


def _is_lost_rank(error: RuntimeError) -> bool:
    """Whether an error of a collective operation comes of another rank's end."""
    text = str(error).lower()
    kind = getattr(distributed, "DistError", ())
    return isinstance(error, kind) or any(word in text for word in ("gloo", "nccl", "connection"))


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _bytes(values: Tensor) -> bytes:
    return values.cpu().numpy().tobytes()
