"""The runs of Auto-PGD on single images that `fastadv.attacks.apgd_pool` carries out, and their results."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Run:
    """One run of one image.

    Attributes:
        image: index of the image.
        number: number of the run among the image's runs; it chooses the random start.
        target: the wrong class at which the loss aims, if it aims at one.
        point: the point at which the run starts, [...]; None is a random point.
        alpha: first step size; None is twice the radius.
        step: number of the run's steps that were made elsewhere.
    """

    image: int
    number: int = 0
    target: int = 0
    point: Tensor | None = None
    alpha: float | None = None
    step: int = 0


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A run that is over.

    Attributes:
        run: the run.
        point: the run's worst case [...]: a misclassified point if one was found, else the point of highest value.
        value: the value at this point.
        succeeded: whether the point is misclassified by the engine.
        alpha: the step size at the misclassified point, else the last step size.
        step: number of steps up to the misclassified point, else of all steps.
    """

    run: Run
    point: Tensor
    value: float
    succeeded: bool
    alpha: float
    step: int
