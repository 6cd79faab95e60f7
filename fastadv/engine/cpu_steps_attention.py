"""Steps of a program for attention: the weights of all pairs of tokens, and the parts of one projection."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fastadv.engine import cpu_channels
from fastadv.engine.copy import AttackCopy
from fastadv.engine.cpu_steps import Pass, PlainStep
from fastadv.engine.cpu_steps_rows import is_narrow
from fastadv.engine.operands import storage_of

_OPS = torch.ops.fastadv


class AttentionStep(PlainStep):
    """``softmax(q k^T / sqrt(d) + mask) v`` by products of whole matrices.

    torch's kernel for blocks of one pass has a gradient that takes many times as long for few tokens.

    Args:
        inputs: q, k and v.
        mask: the tensor added to the scores, without a gradient: a node, the name of a buffer of the copied layer,
            or None.
    """

    def __init__(
        self,
        node: fx.Node,
        copy: AttackCopy,
        inputs: tuple[fx.Node, fx.Node, fx.Node],
        mask: fx.Node | str | None,
    ) -> None:
        super().__init__(node, copy)
        self._three, self._mask = inputs, mask

    def forward(self, run: Pass) -> None:
        """Two products; the weights are kept."""
        values = [run.values[source] for source in self._three]
        if not all(is_narrow(t) and t.dim() == 4 for t in values) or not _fit(*values):
            super().forward(run)
            return
        mask = self._mask_for(run, values[0], values[1])
        if mask is None and self._mask is not None:
            super().forward(run)
            return
        q, k, v = (t.flatten(0, 1) for t in values)
        scale = q.shape[-1] ** -0.5
        weights = torch.bmm(q, k.transpose(1, 2))
        _OPS.attention_weights_(weights, mask, scale)
        run.values[self.node] = torch.bmm(weights, v).view(*values[0].shape[:3], v.shape[-1])
        run.kept[self.node] = q, k, v, weights, scale

    def backward(self, run: Pass) -> None:
        """Four products. The three gradients lie one behind the other where q, k and v have one shape."""
        if self.node in run.tapes:
            super().backward(run)
            return
        q, k, v, weights, scale = run.kept[self.node]
        gradient = run.gradient(self.node).to(q.dtype).flatten(0, 1)
        scores = torch.bmm(gradient, v.transpose(1, 2))
        _OPS.attention_weights_backward_(scores, weights, scale)
        if q.shape == k.shape == v.shape:
            found = list(q.new_empty((3, *q.shape)))
        else:
            found = [torch.empty_like(t) for t in (q, k, v)]
        torch.bmm(scores, k, out=found[0])
        torch.bmm(scores.transpose(1, 2), q, out=found[1])
        torch.bmm(weights.transpose(1, 2), gradient, out=found[2])
        by_source = dict(zip(self._three, found, strict=True))
        for source in reversed(self.inputs):
            part = by_source.get(source)
            if part is None:
                run.arrive_nothing(source)
            else:
                run.arrive_tensor(source, part.view(run.values[source].shape))

    def _mask_for(self, run: Pass, q: Tensor, k: Tensor) -> Tensor | None:
        """The mask as the native pass takes it, if it can."""
        if self._mask is None:
            return None
        own = isinstance(self._mask, str)
        mask = self.part().get_buffer(self._mask) if own else run.values[self._mask]  # type: ignore
        if not isinstance(mask, Tensor) or not mask.is_floating_point() or mask.dim() > 4:
            return None
        pairs = (q.shape[2], k.shape[2])
        mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
        if mask.shape[0] > 1 and mask.shape[1] == 1:
            mask = mask.expand(-1, q.shape[1], -1, -1)
        if mask.shape[0] not in (1, q.shape[0]) or mask.shape[1] not in (1, q.shape[1]):
            return None
        spread = mask.expand(-1, -1, *pairs).flatten(0, 1).to(torch.bfloat16).contiguous()
        # Of tokens that attend to nothing, and of weights that are no numbers, torch has its own notion.
        return spread if bool(spread.amax(-1).isfinite().all()) else None


def _fit(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the heads match, and the weights of all pairs of tokens take little memory."""
    matching = q.shape[:2] == k.shape[:2] == v.shape[:2] and k.shape[2] == v.shape[2]
    most = cpu_channels.MOST_TOKENS
    return matching and 0 < k.shape[2] <= most and 0 < q.shape[2] <= most


class UnbindStep(PlainStep):
    """The slices along an axis, such as queries, keys and values of one projection.

    Args:
        axis: which one.
    """

    def __init__(self, node: fx.Node, copy: AttackCopy, axis: int) -> None:
        super().__init__(node, copy)
        (self._x,), self._axis = self.inputs, axis

    def forward(self, run: Pass) -> None:
        """Views."""
        run.values[self.node] = run.values[self._x].unbind(self._axis)

    def backward(self, run: Pass) -> None:
        """The slices' gradients as one, without a copy where they lie one behind the other."""
        arrived, x = run.gradients_of_items(self.node), run.values[self._x]
        shape = x.select(self._axis, 0).shape
        some = next(iter(arrived.values()))
        parts = [
            arrived[number] if number in arrived else some.new_zeros(shape)
            for number in range(x.shape[self._axis])
        ]
        whole = _joined(parts)
        whole = torch.stack(parts) if whole is None else whole
        run.arrive_tensor(self._x, whole.movedim(0, self._axis))


def _joined(parts: list[Tensor]) -> Tensor | None:
    """Contiguous tensors of one shape as slices of one tensor, if they share its memory."""
    first = parts[0]
    for number, part in enumerate(parts):
        if not part.is_contiguous() or part.shape != first.shape or part.dtype != first.dtype:
            return None
        if storage_of(part) != storage_of(first):
            return None
        if part.storage_offset() != first.storage_offset() + number * first.numel():
            return None
    return first.as_strided((len(parts), *first.shape), (first.numel(), *first.stride()))
