"""The class `AutoAttack`, which is called like the other attacks: images and labels in, adversarial images out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fastadv.attacks.arguments import check_batch, check_model, check_seed
from fastadv.attacks.attack_warnings import warn_of_default_radius
from fastadv.attacks.options import Checked, Configured, names_checked
from fastadv.attacks.rounding import round_towards
from fastadv.evaluation.autoattack import (
    ENGINES,
    AutoAttackResult,
    SearchEngine,
    autoattack,
)
from fastadv.evaluation.autoattack_versions import check_version
from fastadv.evaluation.context import Model
from fastadv.evaluation.model_doubts import doubts_about
from fastadv.evaluation.samples import check_batch_size, radius_or_default
from fastadv.ops.values import check_bounds, check_choice, check_radius, limit, norm_name
from fastadv.seeding import draw_seed


def _known_version(version: str | Sequence[str]) -> str | Sequence[str]:
    check_version(version)
    return version


def _known_engine(engine: SearchEngine) -> SearchEngine:
    check_choice("engine", engine, ENGINES)
    return engine


class AutoAttack(Configured):
    """AutoAttack on one model: ``adv = AutoAttack(model, eps=8 / 255)(x, y)``.

    Each of its attacks gets the images that no attack before it has broken. The function
    `fastadv.evaluation.autoattack` describes the search. It is for long runs: it keeps its state on disk and shows
    its progress.

    Source: F. Croce and M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks", ICML 2020.

    Args:
        model: a float32 module, or any callable from images [B, C, H, W] to logits [B, classes].
        eps: radius of the ball, in the units of the images; by default 8/255, in linf within bounds (0, 1) alone.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        bounds: range of image values.
        version: ``"standard"``, ``"rand"`` or a list of attacks, as in `fastadv.evaluation.autoattack`.
        batch_size: images per pass.
        engine: ``"auto"``, ``"fp32"`` or ``"reference"``, as in `fastadv.evaluation.autoattack`.
        seed: seed of every call without a seed; None draws a seed per call from torch's default generator.

    Raises:
        TypeError: an argument of another type, or an unknown argument.
        ValueError: a value out of range or an unknown word.
    """

    model = Checked[Model](check_model)
    eps = Checked[float](partial(limit, "eps"))
    norm = Checked[str](norm_name)
    bounds = Checked[tuple[float, float]](check_bounds)
    version = Checked[str | Sequence[str]](_known_version)
    batch_size = Checked[int](check_batch_size)
    engine = Checked[SearchEngine](_known_engine)
    seed = Checked[int | None](check_seed)

    def __init__(
        self,
        model: Model,
        eps: float | None = None,
        *,
        norm: str = "linf",
        bounds: tuple[float, float] = (0.0, 1.0),
        version: str | Sequence[str] = "standard",
        batch_size: int = 256,
        engine: SearchEngine = "auto",
        seed: int | None = None,
    ) -> None:
        self.model, self.norm, self.bounds = model, norm, bounds
        self.eps = radius_or_default(eps, self.norm, self.bounds)
        if self.norm == "linf":  # in l2 and l1 the largest radius depends on the images' size
            check_radius("eps", self.eps, self.norm, self.bounds)
        self.version, self.batch_size, self.engine = version, batch_size, engine
        self.seed = seed
        self._last: AutoAttackResult | None = None

    @names_checked
    def __call__(
        self, x: Tensor, y: Tensor, *, seed: int | None = None, sample_ids: Tensor | None = None
    ) -> Tensor:
        """Attack images.

        Args:
            x: images [B, C, H, W] within the bounds, on the model's device.
            y: labels [B], of an integer dtype.
            seed: seed of the random numbers, for this call.
            sample_ids: int64 [B], which random numbers each image gets; default 0 .. B-1.

        Returns:
            [B, C, H, W] in ``x``'s dtype: adversarial images where one was found, the images themselves elsewhere.

        Raises:
            TypeError: as `fastadv.evaluation.autoattack`.
            ValueError: as `fastadv.evaluation.autoattack`.
        """
        self._last, seed = None, check_seed(seed)
        warn_of_default_radius(self.eps, self.norm, self.bounds, stacklevel=4)
        y = check_batch(x, y, sample_ids, self.model, "for AutoAttack")
        if seed is None:
            seed = draw_seed() if self.seed is None else self.seed
        doubts = doubts_about(self.model)
        result = autoattack(
            self.model,
            (x, y),
            eps=self.eps,
            norm=self.norm,
            bounds=self.bounds,
            version=self.version,
            batch_size=self.batch_size,
            engine=self.engine,
            device=x.device,
            seed=seed,
            sample_ids=sample_ids,
        )
        if doubts:
            status = "suspect" if result.status == "ok" else result.status
            result = replace(result, status=status, notes=(*result.notes, *doubts))
        short = x.dtype in (torch.float16, torch.bfloat16)
        adv = x.detach().float() if short else x.detach().clone()
        adv[result.fooled.to(x.device)] = result.adversarial.to(x.device, adv.dtype)
        self._last = result
        return round_towards(adv, x.detach()) if short else adv

    @property
    def last(self) -> AutoAttackResult:
        """The findings of the last call.

        Raises:
            RuntimeError: there was no call, or the last one failed.
        """
        if self._last is None:
            raise RuntimeError("last must be read after a call of the attack that succeeded")
        return self._last
