"""The ranks of a run: joining them, exchanging values between them, and failing together."""

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
from model.device import pick_device
from model.training.threads import limit_threads, own_cores


class RanksError(ShardsError):
    """Ranks that disagree, or a failure of another rank."""


# Errors a run may meet; any other is a bug and keeps its traceback.
FAILURES = (ShardsError, click.ClickException, MemoryError, OSError)


@dataclass(frozen=True)
class Ranks:
    """This process's rank, the world size, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """True for rank 0, which writes files, reports and decides."""
        return self.rank == 0

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, return True if any rank sets it."""
        if self.world_size == 1:
            return flags
        reduced = torch.tensor(flags, dtype=torch.int32, device=self.device)
        distributed.all_reduce(reduced, distributed.ReduceOp.MAX)
        return tuple(bool(one) for one in reduced.tolist())

    def broadcast_flag(self, flag: bool) -> bool:
        """Return rank 0's flag on all ranks."""
        return self.any_of(self.first and flag)[0]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of all ranks' tensors, on this rank's device."""
        values = values.to(self.device, copy=True)
        if self.world_size > 1:
            distributed.all_reduce(values)
        return values

    def minimum(self, value: int) -> int:
        """Return the smallest of all ranks' numbers."""
        reduced = torch.tensor(value, device=self.device)
        if self.world_size > 1:
            distributed.all_reduce(reduced, distributed.ReduceOp.MIN)
        return int(reduced)

    def gather(self, text: str) -> list[str]:
        """Return the texts of all ranks, in order."""
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
        """Return rank 0's bytes on all ranks."""
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
        """Run a block that may fail on some ranks; if it does, all ranks exit, so that none waits for another.

        Rank 0 raises its own error, or a RanksError with that of another rank; the others exit silently. The block must
        not contain collective operations.
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
        """Exit all ranks if one has a failure, as `fail_together` does; a collective operation."""
        texts = self.gather("" if failure is None else describe_error(failure))
        if not any(texts):
            return
        if self.first:
            rank, text = next((rank, text) for rank, text in enumerate(texts) if text)
            raise failure or RanksError(f"rank {rank}: {text}")
        raise SystemExit(getattr(failure, "exit_code", 1)) from failure

    def require_equal(self, what: str, text: str) -> None:
        """Raise a RanksError on rank 0, and exit the others, unless all ranks pass the same lines of text."""
        texts = self.gather(text)
        for rank, other in enumerate(texts):
            if other == texts[0]:
                continue
            ours, theirs = (one.split("\n") for one in (texts[0], other))
            a, b = next((a, b) for a, b in zip([*ours, "nothing"], [*theirs, "nothing"], strict=False) if a != b)
            failure = RanksError(f"{what}: expected the same on all ranks, got {a} on rank 0 and {b} on rank {rank}")
            self.raise_together(failure)

    def wrap(self, network: nn.Module) -> nn.Module:
        """Return the network wrapped so that `backward` averages gradients over all ranks."""
        if self.world_size == 1:
            return network
        match_gradient_strides(network)
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True)

    def gradient_sync(self, network: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Return a context for one micro-batch: gradients are all-reduced only in the last one of a step."""
        if isinstance(network, DistributedDataParallel) and not last:
            return network.no_sync()
        return nullcontext()


def match_gradient_strides(network: nn.Module) -> None:
    """Give gradients the strides of their weights along dimensions of size 1.

    DDP warns where a gradient's strides differ from those of its bucket. Torch matches strides itself along longer
    dimensions; along those of size 1 they depend on the operator.
    """
    for weight in network.parameters():
        if 1 in weight.shape:

            def restride(gradient: Tensor, strides: tuple[int, ...] = weight.stride()) -> Tensor:
                if gradient.stride() == strides:
                    return gradient
                return torch.empty_strided(gradient.shape, strides, dtype=gradient.dtype, device=gradient.device).copy_(
                    gradient
                )

            weight.register_hook(restride)  # type: ignore[no-untyped-call]


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Join the ranks given by RANK, LOCAL_RANK and WORLD_SIZE, as torchrun sets them; without these, run alone.

    `device` is as for `pick_device`; "auto" and "cuda" select the GPU of the local rank.

    Raises:
        click.BadParameter: the device cannot be used.
        click.ClickException: the other ranks cannot be reached, or one was lost.
    """
    world_size, local = (_number(name, default) for name, default in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if world_size == 1:
        yield Ranks(0, 1, local_device(device, local))
        return
    try:
        ranks = _rendezvous(device, local)
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise click.ClickException(f"cannot connect to the other ranks (world size {world_size}): {reason}") from error
    try:
        limit_threads(ranks.rank, ranks.gather(own_cores()))
        yield ranks
    except RuntimeError as error:
        if not _is_lost_rank(error):
            raise
        raise click.ClickException(
            f"rank {ranks.rank}: lost the other ranks; see the error of the rank that failed"
        ) from error
    finally:
        distributed.destroy_process_group()


def local_device(name: str, local: int) -> torch.device:
    """Return the device named `name` for a local rank, without touching another rank's GPU."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if 1 < gpus <= local:
            raise click.BadParameter(f"no GPU for local rank {local}: this machine has {gpus}", param_hint="'--device'")
        name = f"cuda:{local % gpus}"  # a cluster may show each process only its own GPU
    device = pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def describe_error(error: Exception) -> str:
    """Return the message of an error as one line."""
    if isinstance(error, click.ClickException):
        return one_line(error.format_message())
    if isinstance(error, OSError) and error.filename is not None:
        return one_line(f"{os.fsdecode(error.filename)}: {error.strerror}")
    if isinstance(error, MemoryError):
        return one_line(str(error)) or "out of memory"
    return one_line(str(error)) or type(error).__name__


def _rendezvous(device: str, local: int) -> Ranks:
    """Connect to the other ranks, after comparing devices: one rank without a GPU would make NCCL hang."""
    store, rank, world_size = next(rendezvous("env://"))
    chosen, problem = None, ""
    try:
        chosen = local_device(device, local)
    except click.ClickException as error:
        problem = describe_error(error)
    store.set(f"srshards/{rank}", f"{chosen.type if chosen else ''} {problem}")
    answers = [store.get(f"srshards/{number}").decode().partition(" ") for number in range(world_size)]
    for number, (kind, _, trouble) in enumerate(answers):
        if trouble or kind != answers[0][0]:
            text = trouble or f"expected the device type of rank 0, {answers[0][0]}, got {kind}"
            store.set(f"srshards/read/{rank}", "")
            if rank:
                raise SystemExit(2)
            for other in range(world_size):  # rank 0 hosts the store: keep it until all have read
                store.get(f"srshards/read/{other}")
            raise click.UsageError(f"--device {device}: rank {number}: {text}")
    assert chosen is not None
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return Ranks(rank, world_size, chosen)


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise click.UsageError(f"{name}: expected a whole number, got {os.environ[name]!r}") from None


def _is_lost_rank(error: RuntimeError) -> bool:
    """True if a collective operation failed because another rank is gone."""
    text = str(error).lower()
    kind = getattr(distributed, "DistError", ())
    return isinstance(error, kind) or any(word in text for word in ("gloo", "nccl", "connection"))


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _bytes(values: Tensor) -> bytes:
    return values.cpu().numpy().tobytes()
