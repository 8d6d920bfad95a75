"""Ranks: the processes that share a run, started by torchrun. A process alone is rank 0 of 1.

Tensors travel by NCCL on GPUs and by gloo on CPUs, everything else by gloo. Every rank calls the methods of
`Ranks` in the same order: what a rank decides by is what all have been told, never what it finds in a folder.
A rank that dies is named by the others, which end (`heartbeat`).
"""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Before any group exists: its functions have the world's group as their default. Imported later, as torch
# does by itself, they would keep it until Python ends, when a thread of gloo may abort the process.
import torch.distributed.nn.functional
from torch import Tensor

from acs_fast.config import InputError
from acs_fast.heartbeat import Watch
from acs_fast.stopping import RankLost, Stopped

T = TypeVar("T")
PATIENCE = timedelta(hours=24)  # of a collective: ranks wait for one another, the heartbeat watches them


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that share a run, and what they tell one another."""

    rank: int = 0
    num_ranks: int = 1
    watch: Watch | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes what exists once."""
        return self.rank == 0

    def shares(self, count: int) -> list[range]:
        """Each rank's part of 0..count-1: parts are contiguous and differ by one at most."""
        n = self.num_ranks
        return [range(count * rank // n, count * (rank + 1) // n) for rank in range(n)]

    def share(self, count: int) -> range:
        """This rank's part."""
        return self.shares(count)[self.rank]

    def barrier(self) -> None:
        """Wait for every rank."""
        self.collect(None)

    def lead(self, call: Callable[[], T]) -> T:
        """What `call` returns on rank 0, on every rank; the InputError or OSError that it raises likewise.

        On other ranks such an error has `told`: it is rank 0 that says it.
        """
        if self.num_ranks == 1:
            return call()
        result: list[Any] = [None, None]
        if self.leads:
            try:
                result[0] = call()
            except (InputError, OSError) as error:
                result[1] = error
        with self._named():
            dist.broadcast_object_list(result, src=0, device=torch.device("cpu"))
        if result[1] is not None:
            result[1].told = not self.leads
            raise result[1]
        return result[0]

    def collect(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        if self.num_ranks == 1:
            return [value]
        found: list[Any] = [None] * self.num_ranks
        with self._named():
            dist.all_gather_object(found, value)  # by gloo: on the CPU, where the group has one
        return found

    def gather(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks, in the order of the ranks: an all-gather.

        own: [counts[rank], ...] on the device of the ranks, or on the CPU; counts: of every rank.
        """
        if self.num_ranks == 1:
            return own
        most = max(counts)
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own
        every = [torch.empty_like(padded) for _ in counts]
        with self._named():
            dist.all_gather(every, padded)
        return torch.cat([piece[:count] for piece, count in zip(every, counts, strict=True)])

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, in place and in one all-reduce; may be captured."""
        if self.num_ranks == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with self._named():
            dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Say which rank is gone where a connection breaks."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or self.watch is None:
                raise
            raise RankLost(self.watch.lost()) from error

    def leaving(self) -> str:
        """The sentence that names ranks that have died, empty if none has, for a rank that was asked to stop.

        The others do not miss it from now on; it takes some seconds to see who has died.
        """
        return "" if self.watch is None else self.watch.leaving()


@contextlib.contextmanager
def join(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun started, while they share the work; without it this process alone.

    device: `--device`. On GPUs every rank of a machine takes its own; InputError where there are too few.
    """
    if not dist.is_torchelastic_launched():
        yield Ranks()
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        take_gpu()
    distributed: Any = dist
    store, rank, num_ranks = next(distributed.rendezvous("env://", timeout=PATIENCE))
    # a connection of its own: through the other one this process waits for ranks that are late
    watch = Watch(rank, num_ranks, distributed.PrefixStore("acs-fast", store.clone()))
    ranks, failure = Ranks(rank, num_ranks, watch), None
    try:
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        with ranks._named():
            dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=PATIENCE)
        yield ranks
    except BaseException as error:
        failure = error
        raise
    finally:
        watch.close(ended_well=failure is None or isinstance(failure, Stopped))
        leave(on_gpu, failure)


def take_gpu() -> None:
    """Make this rank's own GPU the one that it computes on; InputError where a machine has too few."""
    local, found = dist.get_node_local_rank(fallback_rank=0), torch.cuda.device_count()
    if local >= found:
        error: Any = InputError(
            f"torchrun started more processes here than there are GPUs, which are {found}; "
            f"give --nproc-per-node {found}"
        )
        error.told = local > found  # the first of those too many says it
        raise error
    torch.cuda.set_device(local)


def leave(on_gpu: bool, failure: BaseException | None) -> None:
    """Close the connections of this rank, after a failure without waiting for the others.

    NCCL waits for the end of every captured graph that holds a call of it, so they must be gone before.
    """
    if on_gpu:
        error = failure
        while error is not None:  # their frames hold graphs
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
        gc.collect()
    if not dist.is_initialized():
        return
    with contextlib.suppress(RuntimeError):
        if on_gpu and failure is not None:
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()
