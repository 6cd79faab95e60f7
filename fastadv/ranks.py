"""The processes that work together, the ranks: which one this is, and how they exchange tensors and objects.

`torchrun --nproc-per-node N -m fastadv ...` starts them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastadv.lost_ranks import communicating, naming_lost_ranks

T = TypeVar("T")
TIMEOUT = 600.0  # seconds
_groups = itertools.count()  # that this process has made


def launch() -> str | None:
    """Return torchrun's id of the job, the same for all its processes and attempts; None without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def restarted() -> bool:
    """Return whether torchrun started this process after an attempt that failed.

    A job without an id of its own has torchrun's default id, "none". It cannot be told from another job, and
    counts as not restarted.
    """
    return launch() not in (None, "none") and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"


def is_first() -> bool:
    """Return whether this process is rank 0, or the only one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return launch() is None or os.environ["RANK"] == "0"


def own_device(device: torch.device) -> torch.device:
    """Return this process's device: under torchrun, "cuda" is the GPU of its number on this machine.

    Raises:
        ValueError: if there are more processes than GPUs.
    """
    if device.type != "cuda" or device.index is not None or launch() is None:
        return device
    processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if processes > gpus:
        raise ValueError(f"nproc-per-node must be <= {gpus}, the GPUs here, got {processes}")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@dataclass(frozen=True)
class Ranks:
    """The processes that work together, seen by one of them. Alone, it communicates nothing.

    Every method must be called by all ranks, in the same order.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
        device: the device of tensors that are exchanged.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009, a device is immutable

    @property
    def first(self) -> bool:
        """Whether this process writes the files and the messages."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over the ranks, in place, and return it."""
        if self.world_size > 1:
            with communicating():
                dist.all_reduce(values)
        return values

    def largest(self, values: Sequence[int]) -> list[int]:
        """Return the largest of each number over the ranks."""
        if self.world_size == 1:
            return list(values)
        shared = torch.tensor(values, device=self.device)
        with communicating():
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            return shared.tolist()

    def sum_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of tensors of one dtype over the ranks."""
        if self.world_size == 1:
            return list(tensors)
        sums = [torch.empty_like(tensor) for tensor in tensors]
        unpack(self.sum(pack(tensors)), sums)
        return sums

    def means(self, values: Sequence[float]) -> list[float]:
        """Return the mean of each number over the ranks."""
        if self.world_size == 1 or not values:
            return list(values)
        total = self.sum(torch.tensor(values, dtype=torch.float64, device=self.device))
        return (total / self.world_size).tolist()

    @torch.no_grad()
    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors by the tensors of rank 0."""
        if self.world_size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            packed = pack(same)
            # As bytes, since neither gloo nor nccl sends int16 and all complex numbers.
            with communicating():
                dist.broadcast(_as_bytes(packed), 0)
            unpack(packed, same)

    def gather(self, part: Tensor) -> Tensor:
        """Return the parts of all ranks, which have one shape, one after the other."""
        if self.world_size == 1:
            return part
        own = part.to(self.device).contiguous()  # nccl sends nothing from the CPU's memory
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        with communicating():  # as bytes, see `broadcast`
            dist.all_gather([_as_bytes(one) for one in parts], _as_bytes(own))
        return torch.cat(parts).to(part.device)

    def gather_objects(self, own: T) -> list[T]:
        """Return the object of each rank, in the order of the ranks."""
        if self.world_size == 1:
            return [own]
        found: list[T] = [own] * self.world_size
        # nccl sends objects through the current GPU, which a caller with a group of its own need not have set.
        on_gpu = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with on_gpu, communicating():
            dist.all_gather_object(found, own)
        return found

    def check_same(self, facts: Mapping[str, object]) -> None:
        """Require that all ranks were started with the same arguments and data.

        Args:
            facts: what must be the same, by name; each value's repr must show it.

        Raises:
            ValueError: on all ranks, if the facts differ; the message names the first that does.
        """
        every = self.gather_objects({name: repr(value) for name, value in facts.items()})
        for name in dict.fromkeys(name for one in every for name in one):
            values = [one.get(name, "nothing") for one in every]
            for rank, value in enumerate(values):
                if value != values[0]:
                    raise ValueError(
                        f"{name} must be the same in all processes, got {values[0]} in rank 0 and {value} in rank "
                        f"{rank}"
                    )

    def wait(self) -> None:
        """Wait until all ranks are here.

        No rank has the sum before each has sent its part. A barrier of nccl would guess which GPU is this rank's.
        """
        if self.world_size > 1:
            self.sum(torch.zeros(1, dtype=torch.float32, device=self.device)).tolist()


def group_of_caller(device: torch.device) -> Ranks:
    """Return the processes of torch's default process group.

    Args:
        device: where this process computes.

    Raises:
        ValueError: when there is no such group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "sharded must be False without a process group: torch.distributed.init_process_group makes one, and "
            "`torchrun -m fastadv eval` makes its own"
        )
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


@contextmanager
def joined_ranks(device: torch.device, timeout: float, remedy: str) -> Iterator[Ranks]:
    """Join the other processes: those of the caller's process group, or those that torchrun started.

    Args:
        device: where this process computes. A group made here uses nccl for CUDA, else gloo, and ends with the
            with statement.
        timeout: seconds for which a process waits for another one, in a group made here.
        remedy: a sentence for the error, how the work goes on after the loss of a rank.

    Raises:
        LostRanksError: when a rank waited for longer, or another one has ended; it names the rank where it can.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    elif launch() is None or os.environ["WORLD_SIZE"] == "1":
        yield Ranks(device=device)
    else:
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        on_cuda = device.type == "cuda"
        if on_cuda:
            torch.cuda.set_device(device)
        patience = timedelta(seconds=timeout)
        with communicating():
            store = _store(rank, count, patience)
        with naming_lost_ranks(store, rank, count, timeout, remedy):
            with communicating():
                dist.init_process_group(
                    "nccl" if on_cuda else "gloo",
                    store=store,
                    rank=rank,
                    world_size=count,
                    timeout=patience,
                    device_id=device if on_cuda else None,
                )
            yield Ranks(rank, count, device)
            # Not after an exception: this may wait for ranks without one, and torchrun waits for this rank to end.
            dist.destroy_process_group()


def _store(rank: int, count: int, timeout: timedelta) -> dist.Store:
    """Return the store by which the ranks find each other.

    The store outlives a failed attempt, with the addresses of its processes. Therefore the names of each attempt
    have a prefix of their own.
    """
    held_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        count,
        is_master=rank == 0 and not held_by_torchrun,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    return dist.PrefixStore(f"fastadv_{attempt}_{next(_groups)}", store)


def _as_bytes(t: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, on its memory."""
    return t.view(-1).view(torch.uint8)


def pack(tensors: Sequence[Tensor | None]) -> Tensor:
    """Return the elements of some tensors of one dtype, one after the other; None has no element."""
    return torch.cat([t.flatten() for t in tensors if t is not None])


def unpack(packed: Tensor, tensors: Sequence[Tensor | None]) -> None:
    """Copy the result of `pack` back into the tensors."""
    into = [t for t in tensors if t is not None]
    parts = packed.split([t.numel() for t in into])
    torch._foreach_copy_(into, [part.view_as(t) for part, t in zip(parts, into, strict=True)])
