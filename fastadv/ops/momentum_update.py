"""The accumulated gradient of momentum attacks, by whose direction `pgd_step` then steps."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.ops import checks
from fastadv.ops.pgd_step_reference import rounded_to_float_precision
from fastadv.ops.registry import Op, define
from fastadv.ops.traced import call

DTYPES = (torch.float32, torch.float64)  # of the momentum; half precision would round at every step


def _reference_(momentum: Tensor, grad: Tensor, decay: float, active: Tensor | None) -> None:
    old, new = checks.rows(momentum), checks.rows(grad).double()
    length = new.abs().sum(1, keepdim=True)
    factor = 1 / length
    usable = (length > 0) & torch.isfinite(length) & torch.isfinite(factor)
    if momentum.dtype == torch.float32:
        factor = rounded_to_float_precision(factor)
    added = torch.where(usable, new * factor, 0.0).to(momentum.dtype)
    updated = (decay * old + added).view(momentum.shape)
    if active is not None:
        updated = torch.where(checks.over_samples(active, momentum), updated, momentum)
    momentum.copy_(updated)


_op = define(
    Op(
        "momentum_update_",
        "(Tensor(a!) momentum, Tensor grad, float decay, Tensor? active) -> ()",
        reference=_reference_,
        triton="momentum_update:momentum_update_",
    )
)


def momentum_update_(
    momentum: Tensor, grad: Tensor, decay: float = 1.0, *, active: Tensor | None = None
) -> Tensor:
    """``momentum = decay * momentum + grad / ||grad||_1`` per sample, in place.

    Source: Dong et al. 2018, "Boosting adversarial attacks with momentum" (MI-FGSM), equation 6; equation 7 is
    ``pgd_step(adv, momentum, ...)``. A sample adds nothing where its gradient is zero, has an element that is not
    finite, or has a norm that is infinite in float64 or below 6e-309.

    It is an op of its own, and not an argument of `pgd_step`, so that it works with every norm. Little time would
    be saved by one op: an update of the images is about 0.2 % of a step of PGD on a GPU and 4 % on a CPU.

    Norms are added up in float64 and rounded before they divide. With float32 momentum the result is therefore
    bit-equal on every backend, layout and thread count, except for about one sample in ten million, where the
    last bits of its sum decide how it is rounded.

    Args:
        momentum: the accumulated gradient [B, ...], float32 or float64, any dense layout; zeros at the start of an
            attack. Overwritten. Where gradients are recorded it must not require grad.
        grad: gradient of the loss to be raised, [B, ...]; its dtype may differ.
        decay: the factor of the accumulated gradient, mu; 1 keeps everything, 0 only the last gradient.
        active: bool [B]; where False the sample stays as it is, and its elements of ``grad`` do not matter. None
            is all True.

    Returns:
        ``momentum``.

    Raises:
        RuntimeError: ``momentum`` requires grad, or its elements overlap in memory.
        TypeError: ``momentum`` is not float32 or float64, ``grad`` not floating point, ``decay`` no number, or
            ``active`` no bool tensor.
        ValueError: shapes or devices differ, or ``decay`` is negative or not finite.
    """
    checks.check_float("momentum", momentum)
    if momentum.dtype not in DTYPES:
        raise TypeError(f"momentum must be float32 or float64, got {momentum.dtype}")
    checks.check_float("grad", grad)
    checks.check_same_shape("grad", grad, "momentum", momentum)
    decay = checks.limit("decay", decay)
    checks.check_active(active, momentum)
    checks.check_written("momentum", momentum)
    call("momentum_update_", momentum, grad.detach(), decay, active)
    # A graph that has saved the tensor overwritten here must not be run backward.
    torch.autograd.graph.increment_version(momentum)
    return momentum
