"""The attacks of the package ``pyautoattack``, one batch at a time and without side effects.

The library's own loop, ``run_standard_evaluation``, is not used. Its resumption fails, and its warnings go only to
a log. Its check for optimisation at inference, once it has warned, warns for every later model, and it leaves
Python's trace function unset. The library's attacks and checks are used as they are. They change the process: its
trace function, the call counters of that check, and torch's generators. These are restored after each use. That is
enough to keep runs apart, and simpler than a subprocess, which would need a model that can be pickled and a second
CUDA context.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastadv.attacks.attack_warnings import nan_warnings
from fastadv.evaluation.context import Model, private_generators
from fastadv.evaluation.result_row import Stage

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
RAND = ("apgd-ce", "apgd-dlr")  # for models that draw random numbers
RAND_PASSES = 20  # passes through such a model for one gradient
# For each attack the number of classes that it needs: DLR uses the third largest logit, targeted DLR the fourth.
FEWEST_CLASSES = {"apgd-ce": 2, "apgd-dlr": 3, "apgd-t": 4, "fab": 2, "fab-t": 2, "square": 2}
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
            "AutoAttack needs the package pyautoattack: pip install pyautoattack"
        ) from error
    return pyautoattack


def check_classes(attacks: Sequence[str], classes: int) -> None:
    """Require that every attack is defined for this number of classes.

    Raises:
        ValueError: naming the first attack that needs more classes, and the attacks that can run instead.
    """
    for attack in attacks:
        if classes < FEWEST_CLASSES[attack]:
            usable = [
                a
                for a in ("apgd-ce", "apgd-dlr", "fab-t", "square")
                if classes >= FEWEST_CLASSES[a]
            ]
            raise ValueError(
                f"{attack} needs at least {FEWEST_CLASSES[attack]} classes, the model has {classes}; "
                f"use autoattack(..., version={usable})"
            )


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
        passes: int = 1,
    ) -> None:
        self._checks = import_library().checks
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
        self._library, self._may_draw = library, passes > 1

    def check_model(self, x: Tensor, y: Tensor) -> list[str]:
        """Run the library's checks whether the model is random, is dynamic, or returns no logits.

        The check for random numbers is left out where the version is for random models. The number of target
        classes is limited to the model's classes: the library's 9 raises an IndexError below 10 classes.

        Args:
            x: images [B, C, H, W].
            y: labels [B].

        Returns:
            The library's warnings.
        """
        unit, logger = self._to_unit(x), self._warnings.logger
        with private_generators(self._seed), _untraced(self._checks):
            if not self._may_draw:
                self._checks.check_randomized(self._logits, unit, y, bs=len(x), logger=logger)
            classes = self._checks.check_range_output(self._logits, unit, logger=logger)
            self._checks.check_dynamic(self._logits, unit, False, logger=logger)
        for attack in (self._library.apgd_targeted, self._library.fab):
            attack.n_target_classes = min(attack.n_target_classes, classes - 1)
        return self._warnings.take()

    def check_square(self, clean: int, stages: Sequence[Stage], n: int) -> list[str]:
        """Run the library's check whether Square breaks many images that the gradient attacks did not break.

        Args:
            clean: number of images classified correctly without an attack.
            stages: the stages, with the number of images that each attack left.
            n: number of all images.
        """
        accuracies = {"clean": clean / n} | {stage.name: stage.correct / n for stage in stages}
        self._checks.check_square_sr(accuracies, logger=self._warnings.logger)
        return self._warnings.take()

    def perturb(self, attack: str, x: Tensor, y: Tensor) -> tuple[Tensor, list[str]]:
        """Attack a batch.

        Args:
            attack: a key of ``FEWEST_CLASSES``.
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


@contextmanager
def _untraced(checks: Any) -> Iterator[None]:
    """Set the library's counters of traced calls to zero; restore them and the trace function on exit."""
    trace, counts = sys.gettrace(), dict(checks.funcs)
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    try:
        yield
    finally:
        checks.funcs.update(counts)
        sys.settrace(trace)
