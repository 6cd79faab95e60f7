"""Training by several processes, the ranks, each on its part of every global batch.

`torchrun --nproc-per-node N -m fastadv train ...` starts them; `train` finds them by itself. Between two steps
all ranks hold the same weights, buffers, averages and counters, to the bit. So all ranks come to the same
decisions without communication: whether a step is taken, which checkpoint is the best, when to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastadv.losses.common import at_least_float32
from fastadv.lost_ranks import communicating
from fastadv.ranks import Ranks, pack, unpack

_BUCKET_BYTES = 25 << 20  # the default of DistributedDataParallel


class Synchroniser:
    """Differentiates a loss so that the models of all ranks stay equal.

    Gradients are averaged over the ranks in buckets, and each bucket is sent as soon as the backward pass has
    filled it. Buffers, such as BatchNorm's statistics, are copied from rank 0. DistributedDataParallel does the
    same. Its wrapper is not used, as it needs one module that is called once for each backward pass. The methods
    here call parts of a model, or several models, or one model several times, and run attacks between these calls.
    The hooks exist for one backward pass only, so that an attack causes no communication.

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
        """Put the gradient of the ranks' mean loss into the parameters, which have no gradient before.

        Args:
            loss: this rank's loss, a scalar.

        Returns:
            The mean loss, without gradient; like the gradients, it is finite on all ranks or on no rank.
        """
        if self._ranks.world_size == 1:
            loss.backward()
            return loss.detach()
        sent = self._send_during_backward(loss)
        # The loss, and for each parameter the number of ranks that have a gradient for it.
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
            unpack(packed.div_(self._ranks.world_size), [p.grad for p in bucket])
        for place, parameter in unused:
            if summary[place] == 0:
                parameter.grad = None
        self._ranks.broadcast(self._buffers)
        return summary[0] / self._ranks.world_size

    def _send_during_backward(self, loss: Tensor) -> list[tuple[Tensor, Any]]:
        """Differentiate, and return the sent tensors in the order of the buckets, the same on all ranks."""
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
    """Cut a list of parameters into buckets with one dtype, each of limited size or with a single parameter."""
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
    packed = pack([p.grad for p in bucket])
    with communicating():
        return packed, dist.all_reduce(packed, async_op=True)


def with_synced_norms(model: nn.Module, ranks: Ranks, twice: bool = False) -> nn.Module:
    """Return the model with BatchNorm over the global batch in training mode, in place where possible.

    Args:
        model: the model.
        ranks: the ranks whose batches make up the global batch.
        twice: whether the loss is differentiated twice, which torch's kernels for GPUs do not support.
    """
    if ranks.world_size == 1:
        return model
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.SyncBatchNorm and (twice or ranks.device.type == "cpu"):
            module.__class__ = OwnSyncBatchNorm  # it has the same attributes
    return model


class OwnSyncBatchNorm(nn.SyncBatchNorm):
    """SyncBatchNorm of plain operations, for CPU tensors and second derivatives; batches need equal sizes.

    In training mode torch's class refuses CPU tensors, and its kernels for GPUs have no second derivative.
    """

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
        """Update the running statistics by a batch's statistics; ``values`` is its number per channel and rank."""
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
    """The mean of a tensor over the ranks; the gradient is averaged over the ranks as well.

    The gradient can be differentiated again, as GradAlign does.
    """

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        total = values.clone()
        with communicating():
            dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return _MeanOverRanks.apply(gradients[0])
