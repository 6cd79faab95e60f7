"""Checks of an attack's images that do not rely on the attack: ball, bounds, finite values, and predictions."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fastadv.attacks.attack_warnings import nan_warnings
from fastadv.evaluation.context import Model, assert_eval

NORM_ORDERS = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}
TOLERANCE = 1e-6  # per image element, as a fraction of the width of the bounds


def logits_of(model: Model, x: Tensor) -> Tensor:
    """Logits [B, classes] of the plain model, without gradients.

    Raises:
        RuntimeError: when a module is in training mode or a logit is not finite.
        ValueError: when the model does not return [B, classes] with at least two classes.
    """
    assert_eval(model)
    with torch.no_grad():
        logits = model(x)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != x.shape[0]:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model must return logits [{x.shape[0]}, classes], got {shape}")
    if logits.shape[1] < 2:
        raise ValueError(f"model must return at least 2 classes, got {logits.shape[1]}")
    finite = torch.isfinite(logits).all(dim=1)
    if not bool(finite.all()):
        wrong = int((~finite).sum())
        raise RuntimeError(f"model returned logits that are not finite for {wrong} images")
    return logits


def predict(model: Model, x: Tensor) -> Tensor:
    """Predicted classes [B] int64 of the plain model. Raises as ``logits_of`` does."""
    return logits_of(model, x).argmax(dim=1)


def tolerance(norm: str, elements: int, bounds: tuple[float, float]) -> float:
    """The amount by which a perturbation may exceed eps: 1e-6 per element, measured in the norm.

    Rounding in float32 moves each element by up to 6e-8; an L1 norm over 3,072 of them adds that up.
    """
    per_element = TOLERANCE * max(1.0, bounds[1] - bounds[0])
    return per_element * {"linf": 1.0, "l2": elements**0.5, "l1": float(elements)}[norm]


@dataclass(frozen=True)
class Violations:
    """Counts of inadmissible images, and of NaN that the attacked model gave to an attack.

    Attributes:
        outside_ball: images whose perturbation exceeds eps by more than the tolerance.
        outside_box: images with a value outside the bounds.
        non_finite: images with a NaN or an infinity.
        largest: largest perturbation among the images outside the ball, in the norm.
        nan_points: points that the attack tried and passed over, because the attacked model returned NaN there.
        nan_gradients: elements of the gradients that the attack followed that were NaN or infinite.
        followed: images that withstood the attack, and whose gradient at its last point was looked at.
        blind: those among them whose gradient there is zero everywhere or not finite somewhere.
    """

    outside_ball: int = 0
    outside_box: int = 0
    non_finite: int = 0
    largest: float = 0.0
    nan_points: int = 0
    nan_gradients: int = 0
    followed: int = 0
    blind: int = 0

    def __add__(self, other: Violations) -> Violations:
        """The counts of two batches together."""
        return Violations(
            self.outside_ball + other.outside_ball,
            self.outside_box + other.outside_box,
            self.non_finite + other.non_finite,
            max(self.largest, other.largest),
            self.nan_points + other.nan_points,
            self.nan_gradients + other.nan_gradients,
            self.followed + other.followed,
            self.blind + other.blind,
        )

    def as_dict(self) -> dict[str, int | float]:
        """The counts by name."""
        return asdict(self)


@dataclass
class Audit:
    """Violations found over the batches of one attack.

    Attributes:
        eps: radius of the ball.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        bounds: range of image values.
        found: the counts so far.
    """

    eps: float
    norm: str
    bounds: tuple[float, float]
    found: Violations = Violations()

    def check(self, x: Tensor, adv: Tensor) -> Tensor:
        """Count the violations of one batch.

        Args:
            x: clean images [B, ...].
            adv: their adversarial images, same shape.

        Returns:
            [B] bool, true where the adversarial image is admissible.

        Raises:
            TypeError: when ``adv`` is not a floating-point tensor.
            ValueError: when its shape differs from the shape of ``x``.
        """
        if not isinstance(adv, Tensor) or not adv.is_floating_point():
            kind = adv.dtype if isinstance(adv, Tensor) else type(adv).__name__
            raise TypeError(f"an attack must return a floating-point tensor, got {kind}")
        if adv.shape != x.shape:
            raise ValueError(
                f"an attack must return images of shape {tuple(x.shape)}, got {tuple(adv.shape)}"
            )
        flat, delta = adv.flatten(1), (adv - x).flatten(1)
        size = torch.linalg.vector_norm(delta, ord=NORM_ORDERS[self.norm], dim=1)
        margin = tolerance("linf", 1, self.bounds)
        finite = torch.isfinite(flat).all(dim=1)
        far = finite & (size > self.eps + tolerance(self.norm, delta.shape[1], self.bounds))
        low, high = self.bounds[0] - margin, self.bounds[1] + margin
        out = finite & ((flat.amin(dim=1) < low) | (flat.amax(dim=1) > high))
        self.found += Violations(
            outside_ball=int(far.sum()),
            outside_box=int(out.sum()),
            non_finite=int((~finite).sum()),
            largest=float(size[far].max()) if bool(far.any()) else 0.0,
        )
        return finite & ~far & ~out

    def count_nan(self, points: int, gradients: int) -> None:
        """Count points that an attack passed over, and elements of its gradients that were NaN or infinite."""
        self.found += Violations(nan_points=points, nan_gradients=gradients)

    def count_blind(self, blind: int, followed: int) -> None:
        """Count images that withstood the attack, and those of them that have no gradient at its last point."""
        self.found += Violations(blind=blind, followed=followed)

    def doubts(self) -> list[str]:
        """One sentence per kind of NaN that the attack met; empty without NaN."""
        return nan_warnings(self.found.nan_points, self.found.nan_gradients)

    def problems(self) -> list[str]:
        """One sentence per kind of violation; empty without violations."""
        found, sentences = self.found, []
        if found.non_finite:
            sentences.append(f"{found.non_finite} images with values that are not finite")
        if found.outside_ball:
            sentences.append(
                f"{found.outside_ball} images outside the {self.norm} ball of radius {self.eps:.6g}, "
                f"the farthest at {found.largest:.6g}"
            )
        if found.outside_box:
            sentences.append(f"{found.outside_box} images outside the bounds {self.bounds}")
        return sentences


def admissible_or_clean(x: Tensor, adv: Tensor, audit: Audit) -> Tensor:
    """Adversarial images in float32 [B, ...], with the clean image where the audit rejects one."""
    if isinstance(adv, Tensor) and adv.is_floating_point():
        adv = adv.detach().to(x.device, torch.float32)
    valid = audit.check(x, adv)
    return torch.where(valid.view(-1, *[1] * (x.dim() - 1)), adv, x)
