"""Ranks: the processes that share a run, started by torchrun. A process alone is rank 0 of 1.

Tensors travel by NCCL on GPUs and by gloo on CPUs, everything else by gloo. Every rank calls the methods of
`Ranks` in the same order. A rank that dies is named by the others, which end: its connections break, or its
heartbeat stops (a machine that is gone breaks nothing).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from acs_fast.config import InputError
from acs_fast.stopping import RankLost

T = TypeVar("T")
PATIENCE = timedelta(hours=24)  # of a collective: ranks wait for one another, the heartbeat watches them
BEAT, SILENCE = 1.0, 30.0  # seconds between heartbeats, and without one after which a rank is dead


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

    def share(self, count: int) -> range:
        """This rank's part of 0..count-1: parts are contiguous and differ by one at most."""
        return range(count * self.rank // self.num_ranks, count * (self.rank + 1) // self.num_ranks)

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
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        with self._named():
            sizes = [torch.zeros(1, dtype=torch.long) for _ in found]
            dist.all_gather(sizes, torch.tensor([len(data)]))
            most = int(max(sizes))
            padded = torch.zeros(most, dtype=torch.uint8)
            padded[: len(data)] = data
            every = [torch.zeros(most, dtype=torch.uint8) for _ in found]
            dist.all_gather(every, padded)
        parts = zip(every, sizes, strict=True)
        return [pickle.loads(bytes(part[: int(size)].numpy())) for part, size in parts]

    def gather(self, own: Tensor, count: int) -> Tensor:
        """All rows 0..count-1 from each rank's `share(count)` of them, in order: an all-gather.

        own: [n, ...] on the device of the ranks, or on the CPU.
        """
        if self.num_ranks == 1:
            return own
        parts = [Ranks(rank, self.num_ranks).share(count) for rank in range(self.num_ranks)]
        most = max(map(len, parts))
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own
        every = [torch.empty_like(padded) for _ in parts]
        with self._named():
            dist.all_gather(every, padded)
        return torch.cat([piece[: len(part)] for piece, part in zip(every, parts, strict=True)])

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


class Watch:
    """Heartbeats: each rank counts up its key in the store that torchrun keeps, and looks at the others'."""

    def __init__(self, rank: int, num_ranks: int, store: Any, silence: float = SILENCE):
        self.rank, self.num_ranks, self.store, self.silence = rank, num_ranks, store, silence
        store.set(f"name/{rank}", f"rank {rank} (process {os.getpid()} on {socket.gethostname()})")
        store.add(f"beat/{rank}", 1)
        self._seen: dict[int, tuple[int, float]] = {}
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """This rank has ended as it should; the others need not miss it."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):
            self.store.set(f"name/{self.rank}", "")

    def lost(self) -> str:
        """The sentence that names the ranks whose heart has stopped, after some seconds to see it."""
        with contextlib.suppress(RuntimeError):
            self._silent(0.0)
            time.sleep(4 * BEAT)
            if silent := self._silent(3 * BEAT):
                return sentence(silent)
        return "another rank has ended, so this one stops; run the same command again to continue"

    def _silent(self, seconds: float) -> list[str]:
        """The names of ranks whose count has not moved for so long."""
        found = []
        with self._lock:
            for rank in range(self.num_ranks):
                count, now = int(self.store.add(f"beat/{rank}", 0)), time.monotonic()
                if rank not in self._seen or self._seen[rank][0] != count:
                    self._seen[rank] = count, now
                elif now - self._seen[rank][1] >= seconds > 0 and rank != self.rank:
                    found.append(rank)
            names = [self._name(rank) for rank in found]
        return [name for name in names if name]

    def _name(self, rank: int) -> str:
        key = f"name/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else f"rank {rank}"

    def _run(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                self.store.add(f"beat/{self.rank}", 1)
                silent = self._silent(self.silence)
                text = sentence(silent) if silent else ""
            except RuntimeError:  # the store is torchrun's, on the first machine
                text = "torchrun or the machine of rank 0 is gone; run the same command again to continue"
            if text and not self._ended.is_set():
                print(f"acs-fast: {text}", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread may wait for that rank for ever; what is written is whole


def sentence(names: Sequence[str]) -> str:
    """What is said of dead ranks."""
    return f"{' and '.join(names)} has died, so this one stops; run the same command again to continue"


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
        local, found = dist.get_node_local_rank(fallback_rank=0), torch.cuda.device_count()
        if local >= found:
            raise InputError(
                f"torchrun started more processes here than there are GPUs, which are {found}; "
                f"give --nproc-per-node {found}"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    store: Any = dist.distributed_c10d._get_default_store()
    watch = Watch(dist.get_rank(), dist.get_world_size(), store.clone())
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), watch)
    finally:
        watch.close()
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
