"""Several networks side by side under one linear layer: the model of adversarial feature stacking."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fastadv.fields import arguments_checked
from fastadv.models.split import (
    SplitModel,
    check_counts,
    check_feature_split,
    global_average,
)
from fastadv.ops import linear_merger
from fastadv.ops.values import integer

# An attack's copy of the stack calls the op as it is instead of tracing into its checks.
fx.wrap("linear_merger")


class Stack(SplitModel):
    """The pooled features of several extractors, classified together by one linear merger.

    Source: AFS, equations 1 and 2: z = w^T [g_1(x); ...; g_n(x)] + b. The merger computes in the dtype of its
    weights, also where the extractors run in a narrower dtype.

    Args:
        extractors: at least one model with the feature split and `num_features`; they may differ in kind. Their
            own classifiers stay with them and are not used.
        num_classes: number of logits.

    Raises:
        TypeError: if an extractor has no feature split.
        ValueError: if there is no extractor, or one does not say how many features it has.
    """

    @arguments_checked
    def __init__(self, extractors: Sequence[nn.Module], num_classes: int) -> None:
        super().__init__()
        check_counts(num_classes=num_classes)
        if not extractors:
            raise ValueError("extractors must hold at least one model, got an empty list")
        for extractor in extractors:
            check_feature_split(extractor)
        self.widths = [_width(extractor) for extractor in extractors]
        self.extractors = nn.ModuleList(extractors)
        self.num_features = sum(self.widths)
        self.num_classes = num_classes
        self.merger = nn.Linear(self.num_features, num_classes)

    def subset(self, numbers: Sequence[int]) -> Stack:
        """Return the stack of some of the extractors, with their blocks of the merger's weights and its bias.

        The extractors are shared with this stack; the merger's weights are copied, and were not trained for the
        subset alone.

        Args:
            numbers: of the extractors, counted from 1, in ascending order.

        Raises:
            ValueError: if numbers is empty, not in ascending order, or has the number of no extractor.
        """
        count = len(self.extractors)
        chosen = [integer("numbers", number, at_least=1) for number in numbers]
        if not chosen or chosen != sorted(set(chosen)) or chosen[-1] > count:
            raise ValueError(
                f"numbers must be of extractors 1 to {count}, each once, in ascending order, got {list(numbers)}"
            )
        weight, bias = self.merger.weight.detach(), self.merger.bias.detach()
        blocks = weight.split(self.widths, dim=1)
        some = Stack([self.extractors[number - 1] for number in chosen], self.num_classes)
        some.merger.to(device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            some.merger.weight.copy_(torch.cat([blocks[number - 1] for number in chosen], 1))
            some.merger.bias.copy_(bias)
        return some.train(self.training)

    def pooled_features(self, x: Tensor) -> list[Tensor]:
        """Return the pooled features of every extractor, n tensors [B, d_i]."""
        return _pooled(self.extractors, x)

    def merge(self, pooled: Sequence[Tensor]) -> Tensor:
        """Return the logits [B, num_classes] of pooled features, n tensors [B, d_i]."""
        weight, bias = self.merger.weight, self.merger.bias
        return linear_merger([part.to(weight.dtype) for part in pooled], weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, num_classes] of images [B, C, H, W] in 0..1."""
        return self.merge(self.pooled_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the extractors' maps side by side, [B, d_1 + ... + d_n, H', W']; they must agree in H' and W'."""
        maps = [cast(Any, extractor).forward_features(x) for extractor in self.extractors]
        return torch.cat(maps, 1)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits, or the pooled vectors [B, d_1 + ... + d_n] with `pre_logits`."""
        pooled = global_average(features)
        return pooled if pre_logits else self.merge([pooled])


def _pooled(extractors: Iterable[Any], x: Tensor) -> list[Tensor]:
    return [part.forward_head(part.forward_features(x), pre_logits=True) for part in extractors]


def pooled_side_by_side(extractors: nn.Module, x: Tensor) -> Tensor:
    """Return the pooled features of extractors as one tensor [B, d_1 + ... + d_n].

    Args:
        extractors: the `extractors` of a `Stack`.
        x: images [B, C, H, W].
    """
    return torch.cat(_pooled(cast("Iterable[Any]", extractors), x), 1)


def _width(extractor: nn.Module) -> int:
    inner = getattr(extractor, "model", extractor)  # inside `Normalized`
    width = getattr(inner, "num_features", None)
    if not isinstance(width, int):
        raise ValueError(
            f"extractors must have num_features, the length of their pooled vector; "
            f"{type(inner).__name__} has none"
        )
    return width


@arguments_checked
def importance_ratios(stack: Stack) -> list[float]:
    """Return how much the merger relies on each extractor: its part of the sum of absolute weights.

    Source: AFS's analysis of the merger by its weights. The ratios measure importance only where the features of
    all extractors have about the same magnitude.

    Args:
        stack: the extractors and their merger.

    Returns:
        One number per extractor, in their order; they add up to 1. All equal where every weight is 0.
    """
    blocks = stack.merger.weight.detach().abs().split(stack.widths, dim=1)
    sums = torch.stack([block.double().sum() for block in blocks])
    total = sums.sum()
    ratios = sums / total if total > 0 else torch.full_like(sums, 1 / len(sums))
    return [float(ratio) for ratio in ratios]
