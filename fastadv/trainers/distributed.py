"""Training by several processes, the ranks, each on its part of every global batch.

`torchrun --nproc-per-node N -m fastadv train ...` starts them; `train` finds them by itself. Between two steps
all ranks hold the same weights, buffers, averages and counters, to the bit. So each can decide alone what all
must decide alike: whether a step is taken, which checkpoint is the best, when to stop.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastadv.losses.common import at_least_float32
from fastadv.trainers.lost_ranks import communicating, naming_lost_ranks

_BUCKET_BYTES = 25 << 20  # as DistributedDataParallel has it
TIMEOUT = 600.0  # seconds
_groups = itertools.count()  # that this process has made


def launch() -> str | None:
    """Return torchrun's id of the job, the same for all its processes and attempts; None without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def restarted() -> bool:
    """Return whether torchrun started this process after an attempt that failed.

    Without an id of its own, which torchrun calls "none", a job cannot be told from another one, and is none.
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
    """The processes that train together, seen by one of them. Alone, it communicates nothing.

    Every method must be called by all ranks, in the same order.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are.
        device: where what is communicated must be.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009, a device is immutable

    @property
    def first(self) -> bool:
        """Whether this process writes the files and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over the ranks, in place, and return it."""
        if self.count > 1:
            with communicating():
                dist.all_reduce(values)
        return values

    def largest(self, values: Sequence[int]) -> list[int]:
        """Return the largest of each number over the ranks."""
        if self.count == 1:
            return list(values)
        shared = torch.tensor(values, device=self.device)
        with communicating():
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            return shared.tolist()

    def sum_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums of tensors of one dtype over the ranks."""
        if self.count == 1:
            return list(tensors)
        sums = [torch.empty_like(tensor) for tensor in tensors]
        _unpack(self.sum(_pack(tensors)), sums)
        return sums

    def means(self, values: Sequence[float]) -> list[float]:
        """Return the mean of each number over the ranks."""
        if self.count == 1 or not values:
            return list(values)
        total = self.sum(torch.tensor(values, dtype=torch.float64, device=self.device))
        return (total / self.count).tolist()

    @torch.no_grad()
    def share(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors by those of rank 0."""
        if self.count == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            packed = _pack(same)
            with communicating():
                dist.broadcast(packed, 0)
            _unpack(packed, same)

    def gather(self, part: Tensor) -> Tensor:
        """Return the parts of all ranks, which have one shape, one after the other."""
        if self.count == 1:
            return part
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.count)]
        with communicating():
            dist.all_gather(parts, part)
        return torch.cat(parts)

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.count > 1:
            with communicating():
                dist.barrier()


@contextmanager
def joined_ranks(device: torch.device, timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """Join the other processes: those of the caller's process group, or those that torchrun started.

    Args:
        device: where this process computes. A group made here uses nccl for CUDA, else gloo, and ends with the
            with statement.
        timeout: seconds for which a process waits for another one, in a group made here.

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
        with naming_lost_ranks(store, rank, count, timeout):
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
            # Not after an exception: this may wait for ranks that know of none, and torchrun for this one to end.
            dist.destroy_process_group()


def _store(rank: int, count: int, timeout: timedelta) -> dist.Store:
    """Return where the ranks find each other.

    The store outlives a failed attempt, with the addresses of its processes; so each attempt has its own names.
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


class Synchroniser:
    """Differentiates a loss so that the models of all ranks stay equal.

    Gradients are averaged over the ranks in buckets, each sent as soon as the backward pass has filled it, and
    buffers, such as BatchNorm's statistics, become those of rank 0. That is what DistributedDataParallel does. Its
    wrapper is not used, as it wants one module to be called once for each backward pass: methods here call parts
    of a model, or several models, or one several times, in training mode and between them in an attack. The hooks
    live for one backward pass, so no attack and no other gradient of a method's own sets off communication.

    Args:
        models: the trained models, equal on all ranks.
        ranks: the ranks.
    """

    def __init__(self, models: Sequence[nn.Module], ranks: Ranks) -> None:
        self._ranks = ranks
        self._buffers = [buffer for model in models for buffer in model.buffers()]
        # Gradients come roughly in the opposite order of the parameters.
        parameters = [p for model in models for p in model.parameters() if p.requires_grad]
        self._buckets = _in_buckets(parameters[::-1])
        self._bucket_of = {p: i for i, bucket in enumerate(self._buckets) for p in bucket}

    def backward(self, loss: Tensor) -> Tensor:
        """Put the gradient of the ranks' mean loss into the parameters, which have none before.

        Args:
            loss: this rank's, a scalar.

        Returns:
            The mean loss, without gradient; like the gradients, it is finite on all ranks or on none.
        """
        if self._ranks.count == 1:
            loss.backward()
            return loss.detach()
        sent = self._send_during_backward(loss)
        # The loss, and for each parameter how many ranks have a gradient of it.
        summary = loss.new_ones(1 + len(self._bucket_of))
        summary[0] = loss.detach()
        unused = [(i, p) for i, p in enumerate(self._bucket_of, 1) if p.grad is None]
        for place, parameter in unused:
            summary[place] = 0
            parameter.grad = torch.zeros_like(parameter)
        sent += [_send(bucket) for bucket in self._buckets[len(sent) :]]
        self._ranks.sum(summary)
        for bucket, (packed, work) in zip(self._buckets, sent, strict=True):
            with communicating():
                work.wait()
            _unpack(packed.div_(self._ranks.count), [p.grad for p in bucket])
        for place, parameter in unused:
            if summary[place] == 0:
                parameter.grad = None
        self._ranks.share(self._buffers)
        return summary[0] / self._ranks.count

    def _send_during_backward(self, loss: Tensor) -> list[tuple[Tensor, Any]]:
        """Differentiate; return what was sent, in the order of the buckets, which is that of all ranks."""
        missing = [len(bucket) for bucket in self._buckets]
        sent: list[tuple[Tensor, Any]] = []

        def arrived(parameter: Any) -> None:
            missing[self._bucket_of[parameter]] -= 1
            while len(sent) < len(missing) and missing[len(sent)] == 0:
                sent.append(_send(self._buckets[len(sent)]))

        hooks = [p.register_post_accumulate_grad_hook(arrived) for p in self._bucket_of]
        try:
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
        return sent


def _in_buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Cut a list of parameters into runs of one dtype and at most so many bytes, or of one parameter."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        size += parameter.nbytes
        if not buckets or parameter.dtype != buckets[-1][0].dtype or size > _BUCKET_BYTES:
            buckets.append([])
            size = parameter.nbytes
        buckets[-1].append(parameter)
    return buckets


def _send(bucket: Sequence[nn.Parameter]) -> tuple[Tensor, Any]:
    """Begin to add up the gradients of a bucket over the ranks."""
    packed = _pack([p.grad for p in bucket])
    with communicating():
        return packed, dist.all_reduce(packed, async_op=True)


def _pack(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors if t is not None])


def _unpack(packed: Tensor, tensors: Sequence[Tensor | None]) -> None:
    into = [t for t in tensors if t is not None]
    parts = packed.split([t.numel() for t in into])
    torch._foreach_copy_(into, [part.view_as(t) for part, t in zip(parts, into, strict=True)])


def with_synced_norms(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Return the model with BatchNorm over the global batch in training mode, in place where possible."""
    if ranks.count == 1:
        return model
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.SyncBatchNorm and ranks.device.type == "cpu":
            module.__class__ = CPUSyncBatchNorm  # of the same attributes
    return model


class CPUSyncBatchNorm(nn.SyncBatchNorm):
    """Torch's SyncBatchNorm, which refuses CPU tensors in training mode, for equal batches on CPUs."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [B, C, ...] by the mean and variance of each channel over all ranks."""
        if not (self.training and dist.is_initialized()):
            return super().forward(input)
        shape = (1, -1) + (1,) * (input.dim() - 2)
        x = at_least_float32(input)
        mean = _mean_of_channels(x)
        x = x - mean.view(shape)
        variance = _mean_of_channels(x.square())
        self._track(mean.detach(), variance.detach(), x.numel() // x.shape[1])
        x = x * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            x = torch.addcmul(self.bias.view(shape), x, self.weight.view(shape))
        return x.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, values: int) -> None:
        """Move the running statistics, given those of a batch and its values per channel and rank."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        values *= dist.get_world_size()
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance * (values / (values - 1)), weight)


def _mean_of_channels(x: Tensor) -> Tensor:
    """Mean of each channel over the values of all ranks, [C], differentiable."""
    return _MeanOverRanks.apply(x.mean([0, *range(2, x.dim())]))


class _MeanOverRanks(torch.autograd.Function):
    """The mean of a tensor over the ranks; the gradient of the ranks' summed loss in it is a mean, too."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        total = values.clone()
        with communicating():
            dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return _MeanOverRanks.forward(None, gradients[0])
