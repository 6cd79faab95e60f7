"""One architecture attacked: whether the input gradients of fastadv's engine are the network's.

Networks have random weights, so the results of training are drawn, too. BatchNorm takes its statistics from random
images. Parameters that packages set to a constant, as scales to 1, biases to 0, and the last scale of a residual
branch to 0 or 1e-6, are drawn around it: otherwise whole branches would be silent, and errors in them unheard.

The attack is one step of `fastadv.PGD` in l2 from the images themselves, in the default precision. It moves each
image along its gradient, so that only the public interface is needed to see the gradient.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from architecture_list import build
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastadv import PGD
from fastadv.float32 import full_float32

RIGHT, WARNED, WRONG, NOT_RUN = "right", "warned", "WRONG", "not run"
NARROW_COSINE, FP32_COSINE = 0.8, 0.99
Row = dict[str, Any]

_CALIBRATION_BATCHES, _CALIBRATION_IMAGES = 2, 8
_MEAN_SPARSE = ("flag_update_statistics", "batch_num", "threshold")  # its buffers in RobustBench


def examine(
    name: str,
    batch: int,
    device: torch.device,
    initial: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Row:
    """Attack an architecture and compare.

    Args:
        name: name of an architecture that `architecture_list.build` takes.
        batch: number of images.
        device: device of model and images.
        initial: leave constant parameters as they are.
        tell: called with the name of the next stage, before it begins.

    Returns:
        The facts of a row, ``verdict`` among them.
    """
    torch.manual_seed(0)
    try:
        tell("building")
        built = build(name)
        model, size = built.model.to(device), built.size
        tell("drawing weights")
        if not initial:
            draw_constants(model)
        calibrate(model, size, device)
        x, y = random_images(batch, size, device), torch.randint(2, (batch,), device=device)
        tell("the plain loop")
        logits, gradient = plain_loop(model, x, y)
    except Exception as error:
        return {"verdict": NOT_RUN, "note": _words(error)}
    row: Row = {"size": size, "parameters": sum(p.numel() for p in model.parameters())}
    if not (gradient.isfinite().all() and logits.isfinite().all() and gradient.any()):
        return row | {"verdict": NOT_RUN, "note": "the plain loop's gradient is 0 or not finite"}
    tell("the attack")
    buffers = [buffer.clone() for buffer in model.buffers()]
    modes = [module.training for module in model.modules()]
    row |= attacked(model, x, y, logits, gradient)
    tell("the plain loop in bfloat16")
    row["bf16_cosine"] = autocast_cosine(model, x, y, gradient)
    same = all(map(torch.equal, buffers, model.buffers()))
    if not same or modes != [module.training for module in model.modules()]:
        row |= {"verdict": WRONG, "note": "the attack changed buffers or modes"}
    return row


def attacked(model: nn.Module, x: Tensor, y: Tensor, logits: Tensor, gradient: Tensor) -> Row:
    """One step of an attack against the plain loop's logits [B, C] and gradient [B, ...]."""
    seen = _SeenLogits(len(x))
    attack = PGD(
        model, eps=2.0, alpha=1.0, steps=1, random_start=False, norm="l2", loss=seen, bounds=(-1, 2)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        began = time.perf_counter()
        try:
            adv = attack(x, y, seed=0)
        except Exception as error:
            return {"verdict": WRONG, "note": f"the attack fails: {_words(error)}"}
        seconds = time.perf_counter() - began
    texts = [str(w.message) for w in caught]
    said = [text for text in texts if "fastadv" in text]
    cosines = cosine(adv - x, gradient).tolist()
    last = attack.last
    return {
        "verdict": verdict(min(cosines), last.precision, bool(said)),
        "engine": last.engine,
        "precision": last.precision,
        "reason": last.reason,
        "warnings": said,
        "other_warnings": len(texts) - len(said),
        "cosine": min(cosines),
        "cosines": cosines,
        "logits_error": float((seen.logits - logits).norm() / logits.norm()),
        "seconds": seconds,
    }


def verdict(smallest_cosine: float, precision: str, warned: bool) -> str:
    """Right or wrong, and if right, whether a warning said that the wanted engine does not run."""
    needed = FP32_COSINE if precision == "fp32" else NARROW_COSINE
    if not smallest_cosine >= needed:  # NaN is wrong
        return WRONG
    return WARNED if warned else RIGHT


class _SeenLogits:
    """Cross-entropy that keeps the logits of the last whole batch it was given."""

    def __init__(self, batch: int) -> None:
        self.logits = torch.tensor(float("nan"))
        self._batch = batch

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        if len(logits) == self._batch:
            self.logits = logits.detach().clone()
        return F.cross_entropy(logits, y, reduction="none")


def plain_loop(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, C] and the gradient of each image's cross-entropy [B, ...], in float32."""
    with full_float32():
        leaf = x.clone().requires_grad_()
        logits = model(leaf)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), leaf)
    return logits.detach(), gradient


def autocast_cosine(model: nn.Module, x: Tensor, y: Tensor, gradient: Tensor) -> float | None:
    """The smallest cosine that the plain loop reaches in bfloat16: how rough the network is; None if it fails."""
    try:
        with torch.autocast(x.device.type, torch.bfloat16):
            _, found = plain_loop(lambda leaf: model(leaf).float(), x, y)
    except Exception:
        return None
    return float(cosine(found, gradient).min())


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine per image [B]; 1 where both are 0."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    lengths = a.norm(dim=1) * b.norm(dim=1)
    both_zero = ~a.any(1) & ~b.any(1)
    return torch.where(both_zero, 1.0, (a * b).sum(1) / lengths.clamp_min(1e-300))


def random_images(batch: int, size: int, device: torch.device) -> Tensor:
    """Images [B, 3, size, size] in 0.1 to 0.9: blobs of eighths of the side, and some noise."""
    coarse = torch.rand(batch, 3, 8, 8)
    blobs = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    return (0.1 + 0.6 * blobs + 0.2 * torch.rand(batch, 3, size, size)).to(device)


@torch.no_grad()
def draw_constants(model: nn.Module) -> None:
    """Draw the parameters that are one constant around it."""
    for name, value in model.named_parameters():
        first = value.flatten()[:1]
        if not (value.requires_grad and value.is_floating_point() and (value == first).all()):
            continue
        if first.abs() >= 0.5:
            value.mul_(torch.empty_like(value).uniform_(0.5, 1.5))
        elif value.dim() > 1:
            value.add_(torch.empty_like(value).normal_(0, 0.02))
        elif "bias" in name or "beta" in name:
            value.add_(torch.empty_like(value).normal_(0, 0.1))
        else:
            value.add_(torch.empty_like(value).uniform_(0.1, 0.5))


@torch.no_grad()
def calibrate(model: nn.Module, size: int, device: torch.device) -> None:
    """Set BatchNorm's statistics to those of random images, all batches weighted alike; eval mode is left on."""
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    sparse = [m for m in model.modules() if all(hasattr(m, name) for name in _MEAN_SPARSE)]
    if not norms and not sparse:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    # MeanSparse flattens activations near their mean. Its statistics need the final ones of BatchNorm.
    for parts in ([], sparse) if sparse else ([],):
        _set(parts, flag_update_statistics=1, batch_num=_CALIBRATION_BATCHES)
        for _ in range(_CALIBRATION_BATCHES):
            model(random_images(_CALIBRATION_IMAGES, size, device))
        _set(parts, flag_update_statistics=0, threshold=0.2)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def _set(modules: list[nn.Module], **buffers: float) -> None:
    for module in modules:
        for name, value in buffers.items():
            getattr(module, name).fill_(value)


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
