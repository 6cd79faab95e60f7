"""Checks before the attacks: models that do not fit the data, useless gradients, a guessing surrogate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastadv.attacks.soft_labels import are_probabilities
from fastadv.data.selection import evenly_spread
from fastadv.engine.layout import naming_layout
from fastadv.evaluation.attack_list import (
    BallAttack,
    ChosenAttack,
    Clean,
    Ensemble,
    Minimum,
    check_fewest_classes,
)
from fastadv.evaluation.autoattack_versions import STANDARD, check_classes
from fastadv.evaluation.context import Model, private_generators
from fastadv.evaluation.last_points import (
    BLIND_SHARE,
    count_useless_gradients,
    entropy_sum,
    follows_entropy,
    margin_sum,
)
from fastadv.evaluation.model_checks import PROBABILITIES
from fastadv.evaluation.runner import Outcome, Runner
from fastadv.evaluation.samples import Samples
from fastadv.evaluation.verify import logits_of, predict
from fastadv.seeding import derive_seed

_CHECKED = 64  # images whose gradients are checked
_JUDGED = 256  # images on which a surrogate is judged
_ENOUGH = 50  # fewest images on which guessing can be recognised


@dataclass(frozen=True)
class UselessGradients:
    """Images with a useless gradient: it is zero everywhere, or not finite somewhere.

    Attributes:
        cross_entropy: number of images whose cross-entropy has a useless gradient.
        margin: number of images whose margin, the label's logit less the largest other logit, has one.
        n: number of checked images.
        probabilities: whether the model seems to return probabilities. Their cross-entropy has almost no gradient
            where the model is certain.
    """

    cross_entropy: int = 0
    margin: int = 0
    n: int = 0
    probabilities: bool = False

    def note(self, attack: ChosenAttack) -> str:
        """The note for an attack's row; empty where there is no doubt."""
        hint = "this attack follows gradients and finds too little: run square, too, or autoattack"
        if isinstance(attack, Ensemble):
            by_entropy = False  # its targeted attacks follow differences of logits
            hint = (
                "of its attacks square alone follows no gradients, and finds less than they would"
            )
        elif isinstance(attack, BallAttack):
            if not attack.follows_gradients:
                return ""
            by_entropy = follows_entropy(attack)
        elif isinstance(attack, Minimum):
            by_entropy = attack.kind != "cwl2"
        else:
            return ""
        count = self.cross_entropy if by_entropy else self.margin
        if count <= BLIND_SHARE * self.n:
            return PROBABILITIES if self.probabilities else ""
        return (
            f"the gradient of {count} of {self.n} images is zero everywhere or not finite; {hint}"
        )


@dataclass(frozen=True)
class EarlyFindings:
    """What is found before the first attack.

    Attributes:
        clean: the outcome without an attack.
        is_random: whether the model draws random numbers.
        useless_gradients: images whose gradients lead no attack.
        doubt: a note for the rows of all attacks, on a surrogate that guesses or a network in train mode; empty
            without doubt.
    """

    clean: Outcome
    is_random: bool
    useless_gradients: UselessGradients
    doubt: str


def early_findings(
    runner: Runner,
    chosen: Sequence[ChosenAttack],
    expected: float | None,
    surrogate: str,
    doubts: Sequence[str],
) -> EarlyFindings:
    """Run all checks before the first attack of `evaluate`.

    Args:
        runner: the model, the surrogate and the images.
        chosen: the attacks of the evaluation.
        expected: the known accuracy on clean images, 0..1; None if it is not known.
        surrogate: name of the surrogate; empty without a surrogate.
        doubts: notes for all rows that are known already.

    Raises:
        ValueError: the model has fewer classes than the data or than an attack needs; see also `check_labels`.
        RuntimeError: a model does not take images of this size, or its logits are not finite.
    """
    clean, classes = _clean_outcome(runner, chosen, expected, surrogate)
    guesses = "" if runner.surrogate is None else check_surrogate(runner, classes, surrogate)
    return EarlyFindings(
        clean=clean,
        is_random=runner.draws(),
        useless_gradients=_useless_gradients_for(runner, chosen, clean.robust),
        doubt="; ".join(doubt for doubt in (*doubts, guesses) if doubt),
    )


def _clean_outcome(
    runner: Runner, chosen: Sequence[ChosenAttack], expected: float | None, surrogate: str
) -> tuple[Outcome, int]:
    """Classify the images without an attack, and count the classes, of which the attacks need enough."""
    classes = check_labels(runner, surrogate=surrogate)
    if any(isinstance(attack, Ensemble) for attack in chosen):
        check_classes(STANDARD, classes)
    check_fewest_classes(chosen, classes)
    clean = runner.clean()
    if not isinstance(chosen[0], Clean):
        runner.progress.line(
            f"right on {_percent(clean.robust)} of {len(clean.robust)} clean images"
        )
    _check_clean(clean.robust, classes, expected)
    return clean, classes


def check_labels(runner: Runner, name: str = "", surrogate: str = "") -> int:
    """Require that the model has all classes of the labels, and return its number of classes.

    This runs the first pass of an evaluation. An error of a model therefore names the model and the size of the
    images.

    Args:
        runner: the model, the surrogate and the images.
        name: the model's name in errors; by default its class.
        surrogate: the surrogate's name in errors; by default its class.

    Raises:
        ValueError: a label is too large, the data set has more classes, the surrogate has another number of
            classes, or the images have their channels last.
        RuntimeError: a model does not take images of this size.
    """
    model, other, samples = runner.model, runner.surrogate, runner.samples
    x, _ = samples.take(torch.tensor([0], device="cpu"), runner.device)
    others = None
    draws = private_generators(derive_seed(runner.seed, "evaluate/labels"))
    with draws, naming_layout("images", model, x):
        with _naming(f"model {name or type(model).__name__}", samples.image_shape):
            classes = logits_of(model, x).shape[1]
            _check_classes(runner, classes)
        if other is not None:
            with _naming(f"surrogate {surrogate or type(other).__name__}", samples.image_shape):
                others = logits_of(other, x).shape[1]
    if others not in (None, classes):
        raise ValueError(f"surrogate must have the model's {classes} classes, got {others}")
    return classes


def check_takes_images(
    model: Model, role: str, samples: Samples, device: torch.device | str
) -> None:
    """Run one image through a model, so that an error names the model and the size of the images.

    Args:
        model: the model, on the device.
        role: the model in errors, such as ``"model ResNet"``.
        samples: the images.
        device: the device of the pass.

    Raises:
        RuntimeError: the model does not take images of this size.
    """
    x, _ = samples.take(torch.tensor([0], device="cpu"), torch.device(device))
    with private_generators(0), torch.no_grad(), _naming(role, samples.image_shape):
        model(x)


def _check_classes(runner: Runner, classes: int) -> None:
    """Require that a model of so many classes has all classes of the images."""
    largest = int(runner.samples.labels.max())
    if largest >= classes:
        raise ValueError(f"labels must be below the model's {classes} classes, got {largest}")
    known = runner.samples.num_classes
    if known is not None and known > classes:
        raise ValueError(
            f"model must have the {known} classes of {runner.samples.name!r}, got {classes} logits"
        )


@contextmanager
def _naming(model: str, shape: Sequence[int]) -> Iterator[None]:
    """Let an error of a model name it and the shape of one image, [C, H, W].

    A network that does not take images of this size fails in one of its layers, whose error names neither.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AssertionError, LookupError) as error:
        kinds = (kind for kind in (TypeError, ValueError) if isinstance(error, kind))
        said = str(error) or type(error).__name__
        raise next(kinds, RuntimeError)(
            f"{model}, on images of {'x'.join(map(str, shape))}: {said}"
        ) from error


def useless_gradients(runner: Runner, correct: Tensor) -> UselessGradients:
    """Check the gradients of some images that are classified correctly, [N] bool."""
    indices = correct.nonzero().flatten()[: min(_CHECKED, runner.batch_size)]
    if len(indices) == 0:
        return UselessGradients()
    x, y = runner.samples.take(indices, runner.device)
    x = x.clone().requires_grad_(True)
    with private_generators(derive_seed(runner.seed, "evaluate/blindness")):
        logits = runner.source(x)
        if not logits.requires_grad:
            return (
                UselessGradients()
            )  # attacks that follow gradients refuse such a model themselves
        logits = logits.float()
        entropy, margin = entropy_sum(logits, y), margin_sum(logits, y)
        by_entropy, by_margin = (
            count_useless_gradients(torch.autograd.grad(value, x, retain_graph=value is entropy)[0])
            for value in (entropy, margin)
        )
    return UselessGradients(by_entropy, by_margin, len(indices), are_probabilities(logits.detach()))


def seems_to_guess(right: int, n: int, classes: int) -> bool:
    """Whether a model that is right on ``right`` of n images is no better than guessing."""
    chance = 1 / classes
    return n >= _ENOUGH and right / n <= chance + 3 * math.sqrt(chance * (1 - chance) / n)


def check_surrogate(runner: Runner, classes: int, name: str) -> str:
    """Warn where a surrogate seems to guess, and return the note for every row; else return an empty text."""
    assert runner.surrogate is not None
    right = n = 0
    seed = derive_seed(runner.seed, "evaluate/surrogate")
    for indices in evenly_spread(len(runner.samples), _JUDGED).split(runner.batch_size):
        x, y = runner.samples.take(indices, runner.device)
        with private_generators(seed):
            right += int((predict(runner.surrogate, x) == y).sum())
        n += len(indices)
    if not seems_to_guess(right, n, classes):
        return ""
    doubt = (
        f"the surrogate {name} is right on {right} of {n} clean images, about as many as by guessing, so that "
        "images made on it say nothing about the model"
    )
    warnings.warn(
        f"{doubt}; is it the network of these weights, are images normalised as in its training, and are the "
        "classes numbered alike?",
        stacklevel=5,
    )
    return doubt


def _useless_gradients_for(
    runner: Runner, attacks: Sequence[ChosenAttack], correct: Tensor
) -> UselessGradients:
    """The images with useless gradients; nothing is checked where no attack follows gradients."""
    follows = any(
        isinstance(attack, (Minimum, Ensemble))
        or (isinstance(attack, BallAttack) and attack.follows_gradients)
        for attack in attacks
    )
    return useless_gradients(runner, correct) if follows else UselessGradients()


def _check_clean(correct: Tensor, classes: int, expected: float | None) -> None:
    """Warn where the clean accuracy is as by guessing, or not the expected one: the network may be a wrong one."""
    n, right = len(correct), _count(correct) / len(correct)
    doubt = None
    if seems_to_guess(_count(correct), n, classes):
        doubt = f"about as many as by guessing among {classes} classes"
    elif expected is not None:
        # On a part of the images the accuracy may differ by chance.
        spread = 3 * math.sqrt(max(expected * (1 - expected), 1e-4) / n)
        if abs(right - expected) > 0.01 + spread:
            doubt = f"while {100 * expected:.2f} % are recorded for this model"
    if doubt is not None:
        warnings.warn(
            f"the model is right on {_percent(correct)} of the clean images, {doubt}; is it the network of these "
            "weights, are images normalised as in training, and are the classes numbered alike?",
            stacklevel=5,
        )


def _percent(flags: Tensor) -> str:
    return f"{100 * _count(flags) / len(flags):.2f} %"


def _count(flags: Tensor) -> int:
    return int(flags.sum())
