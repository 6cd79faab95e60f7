"""What the attack tests share: a plain loop to compare with, a trained network, a record of a model's state."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.data import load_dataset
from fastadv.engine.copy import AttackCopy
from fastadv.engine.copy_engines import CopyEngine
from fastadv.engine.first_recordings import tape_now
from fastadv.engine.recorder import record
from fastadv.models import small_cnn

Loss = Callable[[Tensor, Tensor], Tensor]
ORDERS = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}


def plain_pgd(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    start: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    loss: Loss,
    norm: str = "linf",
    targeted: bool = False,
) -> Tensor:
    """PGD as anyone writes it; the loss is a scalar to be raised, or lowered when targeted."""
    adv, sign = start.clone(), -1.0 if targeted else 1.0
    for _ in range(steps):
        adv.requires_grad_()
        grad = sign * torch.autograd.grad(loss(model(adv), y), adv)[0]
        adv = adv.detach()
        if norm == "linf":
            adv = torch.min(torch.max(adv + alpha * grad.sign(), x - eps), x + eps)
        else:
            unit = grad / per_sample_norm(grad).clamp(min=1e-30)
            delta = adv + alpha * unit - x
            adv = x + delta * (eps / per_sample_norm(delta).clamp(min=1e-30)).clamp(max=1)
        adv = adv.clamp(0, 1)
    return adv


def per_sample_norm(t: Tensor) -> Tensor:
    """Euclidean lengths [B, 1, ...]."""
    return t.flatten(1).norm(dim=1).view(-1, *[1] * (t.dim() - 1))


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="sum")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """The best other logit minus the label's, summed."""
    rows = torch.arange(len(y))
    others = logits.clone()
    others[rows, y] = -torch.inf
    return (others.max(1).values - logits[rows, y]).sum()


def logits_ratio(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, summed, from sorted logits."""
    rows = torch.arange(len(y))
    ordered, classes = logits.sort(1, descending=True)
    best_other = torch.where(classes[:, 0] == y, ordered[:, 1], ordered[:, 0])
    scale = ordered[:, 0] - ordered[:, 2] + 1e-12
    return ((best_other - logits[rows, y]) / scale).sum()


def divergence_from(clean_logits: Tensor) -> Loss:
    """KL(clean || adversarial), summed."""
    clean = clean_logits.detach().softmax(1)

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.kl_div(logits.log_softmax(1), clean, reduction="sum")

    return loss


@cache
def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    splits = load_dataset("digits")
    train, test = splits.train, splits.test
    return train.images / 255, train.labels, test.images / 255, test.labels


def digits_test(count: int | None = None) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 8, 8] in 0..1 and labels of the test split."""
    _, _, images, labels = _digits()
    return images[:count].clone(), labels[:count].clone()


def half_small_cnn() -> nn.Module:
    """A small CNN with half its channels, as most of an attack's time in a test goes into convolutions."""
    model = small_cnn()
    model.conv1, model.bn1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
    model.conv2, model.bn2 = nn.Conv2d(16, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32)
    model.conv3, model.bn3 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
    model.linear, model.num_features = nn.Linear(32, 10), 32
    return model


@cache
def _trained_small_cnn(half: bool) -> nn.Module:
    x, y, _, _ = _digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = half_small_cnn() if half else small_cnn()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(6):
            for batch in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
    return model.eval()


def trained_small_cnn(half: bool = True) -> nn.Module:
    """A copy of a small CNN trained on digits, in eval mode, with the last batch's gradients.

    Args:
        half: whether it has half its channels; its weights then fit no `small_cnn`.
    """
    return copy.deepcopy(_trained_small_cnn(half))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every normalisation layer statistics and weights that are far from the identity."""
    generator = torch.Generator().manual_seed(seed)

    def uniform_(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None:
            tensor.uniform_(low, high, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                uniform_(module.running_mean, -0.5, 0.5)
                uniform_(module.running_var, 0.5, 2.0)
            if hasattr(module, "eps"):  # every normalisation layer
                uniform_(getattr(module, "weight", None), 0.5, 1.5)
                uniform_(getattr(module, "bias", None), -0.3, 0.3)
    return model.eval()


def images(batch: int, channels: int = 3, size: int = 8, seed: int = 0) -> Tensor:
    """Uniform images [batch, channels, size, size] in 0..1."""
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def robust_accuracy(model: nn.Module, adv: Tensor, y: Tensor) -> float:
    """Share of adversarial images that the float32 model still gets right."""
    with torch.no_grad():
        return float((model(adv).argmax(1) == y).float().mean())


def largest_change(adv: Tensor, x: Tensor, norm: str) -> float:
    """The largest perturbation of a batch, computed in float64."""
    delta = (adv.double() - x.double()).flatten(1)
    return float(delta.norm(ORDERS[norm], dim=1).max())


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that an attack must leave as it was: copies of values, and identities of the tensors."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    parameters = dict(model.named_parameters())
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "identities": {name: id(tensor) for name, tensor in tensors.items()},
        "gradient identities": {name: id(p.grad) for name, p in parameters.items()},
        "values": {name: _bits(tensor) for name, tensor in tensors.items()},
        "gradients": {n: None if p.grad is None else _bits(p.grad) for n, p in parameters.items()},
        "torch random state": _bits(torch.get_rng_state()),
        "python random state": random.getstate(),
        "numpy random state": repr(np.random.get_state()),
    }


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same_state(after: dict[str, Any], before: dict[str, Any]) -> None:
    """Compare two records part by part, so that a failure says what changed."""
    for part, value in before.items():
        assert after[part] == value, f"the attack changed: {part}"


def copy_of(
    model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32, pack: bool = False
) -> AttackCopy:
    """The attack copy of a model that takes images like ``x``."""
    tape, recording = tape_now(model, x)
    return AttackCopy(tape, recording, dtype, pack)


def refresh(copied: AttackCopy, model: nn.Module, x: Tensor) -> None:
    """Bring the live model's weights over."""
    copied.refresh(record(model, x, careful=False))


def copy_engine(model: nn.Module, x: Tensor, precision: str) -> CopyEngine:
    """An engine on a copy under autograd."""
    tape, recording = tape_now(model, x)
    return CopyEngine(tape, recording, precision, "the reason", inductor=False)
