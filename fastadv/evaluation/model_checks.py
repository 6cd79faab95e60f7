"""Signs that AutoAttack's figure may be too high, for which a result becomes suspect.

The code of AutoAttack's authors looks for the same: random numbers, probabilities in place of logits, gradients
that the model takes in its forward pass, and a Square attack that beats the attacks by gradients.
Sources: F. Croce and M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020, and F. Croce et al., "Evaluating the adversarial robustness of adaptive
test-time defenses", ICML 2022.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType

import torch
from torch import Tensor

from fastadv.attacks.soft_labels import are_probabilities
from fastadv.evaluation.context import private_generators
from fastadv.evaluation.result_row import Stage
from fastadv.evaluation.runner import Runner
from fastadv.evaluation.verify import logits_of
from fastadv.seeding import derive_seed

PROBABILITIES = (
    "the model returns probabilities. The losses expect logits and have other, smaller gradients in "
    "probabilities, so this attack finds too little; leave out the softmax, or return its logarithm"
)
_RANDOM = (
    "the model draws random numbers, and each attack meets other ones than the final check; run AutoAttack with "
    'version="rand"'
)
_DYNAMIC = (
    "the model takes gradients in its forward pass, as defences do that optimise at test time; AutoAttack may "
    "find too little, so that an attack made for this defence is needed"
)
_BEATEN = 0.002  # share of the images beyond which Square's gain is a sign of useless gradients
# Every gradient that Python code takes passes through one of these.
_DIFFERENTIATE = frozenset((torch.autograd.grad.__code__, torch.autograd.backward.__code__))


def model_warnings(runner: Runner, may_draw: bool) -> list[str]:
    """Warnings about the model, from passes over the first images.

    Args:
        runner: model, images and settings, in evaluation mode.
        may_draw: whether AutoAttack runs in its version for models that draw random numbers.
    """
    x, _ = runner.samples.take(runner.samples.batches(runner.batch_size)[0], runner.device)
    found = [_RANDOM] if not may_draw and runner.draws() else []
    with private_generators(derive_seed(runner.seed, "autoattack/checks")):
        logits, is_dynamic = _watched(lambda: logits_of(runner.model, x))
    if are_probabilities(logits):
        found.append(PROBABILITIES)
    return found + [_DYNAMIC] * is_dynamic


def square_warnings(stages: Sequence[Stage], n: int) -> list[str]:
    """A warning if Square breaks more images than the attacks by gradients should have left to it.

    Args:
        stages: the stages, with the number of images that each attack left.
        n: number of all images.
    """
    square = [stage.correct for stage in stages if stage.name == "square"]
    others = [stage.correct for stage in stages if stage.name != "square"]
    if not square or not others or min(others) - square[0] <= _BEATEN * n:
        return []
    left = min(others)
    return [
        f"square broke {left - square[0]} images of the {left} that the other attacks had left, a sign that the "
        "model's gradients mislead; run square with more queries, or an attack made for this model"
    ]


def _watched(call: Callable[[], Tensor]) -> tuple[Tensor, bool]:
    """The result of a call, and whether Python code took gradients in it. The caller's trace function is kept."""
    taken = False

    def trace(frame: FrameType, event: str, argument: object) -> None:
        nonlocal taken
        taken = taken or frame.f_code in _DIFFERENTIATE

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return call(), taken
    finally:
        sys.settrace(before)
