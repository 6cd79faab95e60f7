"""The report of an attack: signs of masked gradients on its way, and a check of its result."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastadv.ops.checks import over_samples
from fastadv.ops.pgd_step_per_channel import Bounds

_SLACK = 1e-6  # of eps: the rounding of a norm over some thousand float32 elements


@dataclass(frozen=True, eq=False)
class AttackReport:
    """Counters of one call of an attack.

    They are kept on the device and become numbers when one of the properties is read, which on a GPU waits for
    the attack to end. Counting does not wait.

    Attributes:
        engine: name of the engine that ran.
        reason: the reason for this engine.
        precision: precision of the network's passes: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        elements: number of elements of input gradients that the attack used, over all steps and restarts.
        counts: int64 [2] on the device, the number of zero elements among them, and of NaN and infinite ones.
        nan_among_logits: int64 scalar on the device, the number of points with a NaN among their logits.
        losses: one scalar per gradient, on the device.
        outside: share of the result outside ball or bounds, a scalar on the device.
    """

    engine: str
    reason: str
    precision: str
    elements: int
    counts: Tensor
    nan_among_logits: Tensor
    losses: tuple[Tensor, ...]
    outside: Tensor

    @property
    def zero_gradient_share(self) -> float:
        """Share of exactly zero elements in the input gradients: a large one is a sign of gradient masking."""
        return int(self.counts[0]) / max(self.elements, 1)

    @property
    def nan_gradients(self) -> int:
        """Number of NaN and infinite elements in the input gradients, where the attack has no direction.

        Steps of PGD in linf and l2 count the infinite elements of an image as one.
        """
        return int(self.counts[1])

    @property
    def nan_points(self) -> int:
        """Number of points with a NaN among their logits. An attack passes over them: they count as no success."""
        return int(self.nan_among_logits)

    @property
    def outside_share(self) -> float:
        """Share of the result's elements outside ball or bounds, or NaN; anything but 0 is a fault.

        In l2 and l1 all elements of an image whose perturbation is longer than eps, by more than rounding, count.
        """
        return float(self.outside)

    @property
    def loss_per_step(self) -> tuple[float, ...]:
        """Mean over the images of the value that the attack raises, at each point whose gradient it took.

        Targeted attacks raise minus the loss of their targets. Restarts follow one another.
        """
        return tuple(torch.stack(self.losses).tolist()) if self.losses else ()

    def __str__(self) -> str:
        """The report in one line of text."""
        losses = self.loss_per_step
        course = f", loss {losses[0]:.4g} to {losses[-1]:.4g}" if losses else ""
        return (
            f"{self.engine} engine ({self.reason}), {self.precision}{course}, "
            f"zero gradients {100 * self.zero_gradient_share:.2f} %, "
            f"NaN or infinite gradients {self.nan_gradients}, NaN logits at {self.nan_points} points, "
            f"outside {100 * self.outside_share:.2f} %"
        )


def outside_share(adv: Tensor, x: Tensor, eps: float | Tensor, norm: str, bounds: Bounds) -> Tensor:
    """Share of elements outside the eps-ball around ``x`` or the bounds; NaN is outside.

    Args:
        adv: the result of an attack [B, ...].
        x: the clean images [B, ...], in the dtype of ``adv``.
        eps: radius, a number, [B] or in linf [B, C, 1, ...].
        norm: ``"linf"``: element by element and exactly, in the arithmetic of the attack; ``"l2"`` and ``"l1"``:
            image by image, with a slack of 1e-6 of eps, and of the norm that the rounding of every element to the
            dtype of the arithmetic can have.
        bounds: lowest and highest allowed value; in linf also tensors that broadcast over the images.

    Returns:
        A scalar on the device of ``adv``.
    """
    wide = torch.promote_types(adv.dtype, torch.float32)
    low, high = (_as_images_have(bound, adv.dtype) for bound in bounds)
    a, c = adv.to(wide), x.to(wide)
    inside = (a >= low) & (a <= high)
    if norm == "linf":
        radius = over_samples(eps, x) if isinstance(eps, Tensor) and eps.dim() == 1 else eps
        inside &= (a >= c - radius) & (a <= c + radius)
    else:
        order = 2 if norm == "l2" else 1
        slack = x[:1].numel() ** (1 / order) * _rounding(wide, *bounds)
        length = torch.linalg.vector_norm((a - c).flatten(1), order, dim=1, dtype=torch.float64)
        inside &= over_samples(length <= eps * (1 + _SLACK) + slack, x)
    return (~inside).float().mean()


def _as_images_have(bound: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """A bound rounded to the dtype of the images."""
    if isinstance(bound, Tensor):
        return bound.to(dtype)
    (rounded,) = torch.tensor([bound], dtype=dtype, device="cpu").tolist()
    return float(rounded)


def _rounding(dtype: torch.dtype, *bounds: float | Tensor) -> float:
    """By how much rounding to ``dtype`` can move an element of an image."""
    return torch.finfo(dtype).eps / 2 * max(abs(float(bound)) for bound in bounds)
