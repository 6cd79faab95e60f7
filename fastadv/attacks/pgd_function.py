"""PGD as a function, which keeps the engine of each model that it has attacked."""

from __future__ import annotations

import weakref

from torch import Tensor, nn

from fastadv.attacks.arguments import EngineName, Precision, TrainMode
from fastadv.attacks.objectives import LossFunction
from fastadv.attacks.options import names_checked
from fastadv.attacks.pgd import PGD
from fastadv.attacks.pgd_settings import Keep
from fastadv.engine.engines import Model
from fastadv.engine.selection import EngineCache

_CACHES: weakref.WeakKeyDictionary[nn.Module, EngineCache] = weakref.WeakKeyDictionary()


@names_checked
def pgd_fused(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    *,
    eps: float = 8 / 255,
    alpha: float = 2 / 255,
    steps: int = 10,
    norm: str = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    random_start: bool = True,
    restarts: int = 1,
    targeted: bool = False,
    loss: str | LossFunction = "ce",
    precision: Precision = "auto",
    engine: EngineName = "auto",
    train_mode: TrainMode = False,
    keep: Keep = "last",
    sparsity: float = 0.95,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """Attack a batch with projected gradient descent (Madry et al. 2018, section 2.1).

    On return, and after an exception, the model's modes, ``requires_grad`` flags, gradients, buffers and weights
    are unchanged. The engine of a known model is used again, with the current weights.

    Args:
        model: a module, or any callable, from images [B, ...] to logits [B, C]; normalisation of the
            images belongs inside it.
        x: images [B, ...] within ``bounds``, floating point.
        y: labels [B], int64 or another integer dtype; with ``targeted``, the classes to reach. With the
            losses ``"ce"``, ``"kl"`` (then the divergence of the softmax from the labels) and callables also soft
            labels [B, C]: probabilities. Their likeliest class decides whether an image is misclassified. None
            for the loss ``"kl"`` with ``keep="last"``, which then looks at no label.
        eps: as in `fastadv.PGD`.
        alpha: as in `fastadv.PGD`.
        steps: as in `fastadv.PGD`.
        norm: as in `fastadv.PGD`.
        bounds: as in `fastadv.PGD`.
        random_start: as in `fastadv.PGD`.
        restarts: as in `fastadv.PGD`.
        targeted: as in `fastadv.PGD`.
        loss: as in `fastadv.PGD`.
        precision: as in `fastadv.PGD`.
        engine: as in `fastadv.PGD`.
        train_mode: as in `fastadv.PGD`.
        keep: as in `fastadv.PGD`.
        sparsity: as in `fastadv.PGD`.
        seed: seed of the random start; None draws a seed from torch's default generator.
        sample_ids: int64 [B], select the random numbers of each sample; default 0 .. B-1.

    Returns:
        Adversarial images [B, ...] in ``x``'s dtype and layout, inside ball and bounds. An empty batch is
        returned unchanged.

    Raises:
        TypeError: an argument of the wrong type, named in the message.
        ValueError: an argument out of range, shapes or devices that do not fit, images that are not finite
            or outside ``bounds``, labels outside the model's classes.
    """
    attack = PGD(
        model,
        eps,
        alpha,
        steps,
        random_start,
        norm=norm,
        bounds=bounds,
        restarts=restarts,
        targeted=targeted,
        loss=loss,
        precision=precision,
        engine=engine,
        train_mode=train_mode,
        keep=keep,
        sparsity=sparsity,
    )
    if isinstance(model, nn.Module):
        attack._engines = _CACHES.setdefault(model, attack._engines)
    return attack(x, y, seed=seed, sample_ids=sample_ids)
