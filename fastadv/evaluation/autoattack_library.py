"""The attacks of the package ``pyautoattack``, one batch at a time and without side effects.

The library's own loop, ``run_standard_evaluation``, is not used. Its resumption fails, and its warnings go only to
a log. In place of its checks are those of `fastadv.evaluation.model_checks`. The library's attacks are used as
they are. They change torch's generators, which are restored after each use.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from fastadv.attacks.attack_warnings import nan_warnings
from fastadv.evaluation.context import Model, private_generators

_LIBRARY_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
_POINTER = " See flags_doc.md for details."  # at the end of the library's messages; the file is not shipped


def import_library() -> Any:
    """The module ``pyautoattack``.

    Raises:
        ImportError: naming the package to install.
    """
    try:
        import pyautoattack
    except ImportError as error:
        raise ImportError(
            "AutoAttack's reference needs the package pyautoattack: pip install pyautoattack"
        ) from error
    return pyautoattack


class ReferenceAttacks:
    """The library's attacks on one model, with the settings of its standard version.

    Images are given and returned within ``bounds``. The library gets them scaled to [0, 1], its only range.

    Args:
        model: the model, in evaluation mode.
        eps: radius of the ball, in the units of the images.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        bounds: range of image values.
        device: device of the model.
        seed: set in the library before every batch, as in its own loop.
        classes: number of the model's classes.
        passes: number of passes through the network for each gradient of Auto-PGD.
    """

    def __init__(
        self,
        model: Model,
        *,
        eps: float,
        norm: str,
        bounds: tuple[float, float],
        device: torch.device,
        seed: int,
        classes: int,
        passes: int = 1,
    ) -> None:
        self._model, self._seed = model, seed
        self._low, self._width = bounds[0], bounds[1] - bounds[0]
        self._unit_bounds = bounds == (0.0, 1.0)
        self._warnings = _Warnings()
        self._useless = 0  # elements of gradients that are not finite, in the batch under attack
        library = import_library().AutoAttack(
            self._logits,
            eps=eps if self._unit_bounds else eps / self._width,
            norm=_LIBRARY_NORMS[norm],
            seed=seed,
            device=device,
            version="standard",
        )
        library.apgd.logger = library.apgd_targeted.logger = self._warnings.logger
        library.apgd.eot_iter = library.apgd_targeted.eot_iter = passes
        for attack in (library.apgd_targeted, library.fab):
            # More classes than there are raise an IndexError.
            attack.n_target_classes = min(attack.n_target_classes, classes - 1)
        self._library = library

    def perturb(self, attack: str, x: Tensor, y: Tensor) -> tuple[Tensor, list[str]]:
        """Attack a batch.

        Args:
            attack: a name among those of `autoattack_versions.FEWEST_CLASSES`.
            x: images [B, C, H, W] that are classified correctly.
            y: labels [B].

        Returns:
            Images [B, C, H, W], adversarial where the attack succeeded, and the library's warnings.
        """
        method = self._method(attack)
        method.seed = self._seed
        with private_generators(self._seed), torch.no_grad():
            adv = method.perturb(self._to_unit(x), y)
        found = [*self._warnings.take(), *nan_warnings(0, self._useless)]
        self._useless = 0
        return (adv if self._unit_bounds else adv * self._width + self._low), found

    def _method(self, attack: str) -> Any:
        """The library's object for an attack, set up as its own loop does."""
        library = self._library
        if attack in ("apgd-ce", "apgd-dlr"):
            library.apgd.loss = attack.removeprefix("apgd-")
            return library.apgd
        if attack in ("fab", "fab-t"):
            library.fab.targeted = attack == "fab-t"
            return library.fab
        return {"apgd-t": library.apgd_targeted, "square": library.square}[attack]

    def _to_unit(self, x: Tensor) -> Tensor:
        return x.clone() if self._unit_bounds else ((x - self._low) / self._width).clamp_(0.0, 1.0)

    def _logits(self, unit: Tensor) -> Tensor:
        if unit.requires_grad:
            unit = unit.view_as(unit)  # the hook sees the gradient of this pass alone
            unit.register_hook(self._count_useless)
        return self._model(unit if self._unit_bounds else unit * self._width + self._low)

    def _count_useless(self, gradient: Tensor) -> None:
        self._useless += int((~gradient.isfinite()).sum())


class _Warnings(logging.Handler):
    """Collects the warnings of the library."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._messages: list[str] = []
        # A logger of our own, which is not in the process's table of loggers, so that nothing must be restored.
        self.logger = logging.Logger("fastadv.autoattack")
        self.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage().removesuffix(_POINTER))

    def take(self) -> list[str]:
        """The messages since the last call."""
        messages, self._messages = self._messages, []
        return messages
