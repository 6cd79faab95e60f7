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
    y: Tensor,
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
            labels [B, C]: probabilities. Their likeliest class decides whether an image is misclassified.
        eps: radius of the ball, in the units of ``x``; at most the distance between two images within the bounds.
        alpha: step size, in the units of ``x``; in l2 and l1 the length of the whole step.
        steps: number of steps, at least 1.
        norm: ``"linf"``, ``"l2"``, or ``"l1"`` (sparse steps: Tramer and Boneh 2019; `fastadv.ops.pgd_step`), also
            as other libraries write it: "Linf", "L2", np.inf, 2.
        bounds: lowest and highest allowed value of an image.
        random_start: start from a uniform random point of the ball (`fastadv.ops.random_start`), else from ``x``.
        restarts: runs from different random starts; per sample the result of highest loss (or best as by ``keep``)
            is returned.
        targeted: minimise the loss of the classes ``y`` instead of maximising it.
        loss: ``"ce"``, ``"cw"`` (margin), ``"dlr"``, ``"kl"`` (TRADES, against the clean logits; needs
            ``random_start``, since its gradient is zero at ``x``) or a callable ``(logits, y) -> [B] or scalar``.
        precision: precision of the network: ``"fp32"``, ``"bf16"``, ``"fp16"``, or ``"auto"``: bf16 for modules
            where the hardware has it, else fp32. Logits, loss and images are float32 (float64 for float64 images)
            always.
        engine: ``"eager"`` runs the live model; ``"compiled"`` runs a folded copy (with ``torch.compile``
            on a GPU); ``"graph"`` runs the whole attack on the copy as a CUDA graph. ``"auto"`` runs a folded
            copy in a narrow precision, on a GPU recorded at the second call of a batch size. On the CPU it
            measures where another engine may be faster, and runs the fastest that is right. With
            ``precision="fp32"`` it runs the live model, and the result equals the result of a plain loop to the
            bit. Where ``precision="auto"`` comes to fp32, it runs a folded copy on a CPU, and the live model on a
            GPU. ``"fixed"`` is ``"auto"`` without measuring, so that every process runs the same engine.
        train_mode: attack the model in train mode, for recipes that do so; its buffers are restored. A sample's
            result then depends on the other samples of the batch. ``"moving"`` is train mode in which every pass
            of the attack updates BatchNorm's running statistics for good, as in loops that do not restore them.
        keep: the point of a run that is returned: ``"last"`` or ``"best"``. For each sample the best point has the
            highest loss among the successful points, or among all points if no point succeeds, start and end
            included. ``"best"`` costs one more forward pass per restart.
        sparsity: share of an image's elements that an l1 step does not move, 0 <= sparsity < 1; other norms
            ignore it.
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
