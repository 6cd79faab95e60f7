"""The functions `masking_checks` and `sanity_checks`: signs of gradient masking.

An attack with useful gradients gets no weaker with more steps or a larger radius.

Source: A. Athalye, N. Carlini and D. Wagner, "Obfuscated gradients give a false sense of security", ICML 2018,
section 3.1; N. Carlini et al., "On evaluating adversarial robustness", 2019, sections 3.2 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.attacks.attack_warnings import nan_warnings
from fastadv.attacks.options import names_checked
from fastadv.evaluation.attack_list import BallAttack
from fastadv.evaluation.context import Model, all_in_evaluation_mode, evaluation_mode
from fastadv.evaluation.early_checks import check_labels
from fastadv.evaluation.findings import ROUNDING, Finding, monotone, rising_loss, unbounded
from fastadv.evaluation.last_points import LastPoints, count_useless_gradients, entropy_sum
from fastadv.evaluation.model_doubts import doubts_about
from fastadv.evaluation.progress import ProgressDisplay
from fastadv.evaluation.runner import Runner
from fastadv.evaluation.samples import as_samples, check_batch_size, check_eps, radius_or_default
from fastadv.evaluation.shared_work import SharedWork
from fastadv.evaluation.transfer import Surrogate, as_surrogate
from fastadv.evaluation.verify import Audit, Violations, admissible_or_clean, logits_of, predict
from fastadv.ops.values import integer, largest_radius, limit, norm_name, number, shown


@names_checked
def masking_checks(
    model: Model,
    data: Any,
    *,
    eps: float | None = None,
    eps_factors: Sequence[float] = (0.25, 0.5, 1.0, 2.0),
    steps: Sequence[int] = (1, 5, 20, 50),
    norm: str = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    slack: float = 0.01,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    seed: int = 0,
    max_examples: int | None = None,
    progress: bool = True,
) -> list[Finding]:
    """Check that PGD behaves on a model as it does where gradients are useful.

    There are four checks. Robust accuracy does not rise with eps. It does not rise with the number of steps, each
    of size eps / 4. With eps so large that any image is allowed, it is almost zero. Almost no gradient is zero
    everywhere or not finite, neither at an image nor at the last point of a run of PGD that the image withstood.

    Args:
        model: as for ``evaluate``.
        data: as for ``evaluate``; a few hundred images are enough.
        eps: radius at which the number of steps is varied; by default 8/255, in linf within bounds (0, 1) alone.
        eps_factors: factors of eps, in increasing order, for the attacks at several radii. These have the largest
            number of steps. Factors with which the ball would be larger than the range of images are left out.
        steps: numbers of steps, in increasing order.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        bounds: range of image values.
        slack: share of the images by which accuracy may rise before a check fails, and that may be left when eps
            is unbounded.
        batch_size: images per pass.
        device: device of the run; by default the device of the model.
        seed: seed of the random starts.
        max_examples: use only so many images, as for ``evaluate``.
        progress: show which check is running.

    Returns:
        One finding per check. A failed check means that the robust accuracy of this model, as measured by gradient
        attacks, is too high. Passing all checks proves nothing.

    Raises:
        ValueError: for an argument out of range.
    """
    norm, seed = norm_name(norm), integer("seed", seed)
    eps = radius_or_default(eps, norm, bounds)
    _check_arguments(eps, eps_factors, steps, slack)
    samples = as_samples(data, bounds, max_examples)
    eps = check_eps(eps, norm, samples)
    doubts_about(model)
    with evaluation_mode(model, device) as where:
        runner = Runner(
            model,
            samples,
            norm,
            check_batch_size(batch_size),
            where,
            seed,
            SharedWork(ProgressDisplay(progress)),
        )
        check_labels(runner)
        probe = _Probe(runner, runner.clean().robust)
        factors = _factors_within_reach(runner, eps, eps_factors)
        of_pgd = _of_pgd(probe, eps, factors, steps, slack)
        return [*of_pgd, _useless_gradients(probe, slack)]


def sanity_checks(
    model: Model,
    data: Any,
    *,
    eps: float | None = None,
    eps_factors: Sequence[float] = (0.25, 0.5, 1.0, 2.0),
    steps: Sequence[int] = (1, 5, 20, 50),
    queries: int = 1000,
    norm: str = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    slack: float = 0.01,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    seed: int = 0,
    max_examples: int | None = 200,
    surrogate: Surrogate | Model | None = None,
    eot: int = 1,
    progress: bool = True,
) -> list[Finding]:
    """Check a model for signs of gradient masking.

    The checks are the four of `masking_checks` and three others. The loss does not fall as eps grows. No black-box
    attack breaks more images than Auto-PGD, neither Square nor PGD on the surrogate. The model draws no random
    numbers.

    Args:
        model: as for ``evaluate``.
        data: as for ``evaluate``.
        eps: as in `masking_checks`; also the radius of Auto-PGD, Square and PGD on the surrogate.
        eps_factors: as in `masking_checks`.
        steps: as in `masking_checks`; Auto-PGD, and PGD on a surrogate, have the largest number.
        queries: number of queries of Square.
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        bounds: range of image values.
        slack: as in `masking_checks`, for every check; for the loss, the part of its largest value by which it may
            fall.
        batch_size: images per pass.
        device: device of the run; by default the device of the model.
        seed: seed of the random numbers.
        max_examples: use only so many images, as for ``evaluate``.
        surrogate: another model, as for ``evaluate``.
        eot: as for ``evaluate``.
        progress: show which check is running.

    Returns:
        One finding per check. A failed check means that the robust accuracy of this model, as measured by gradient
        attacks, may be too high. Passing all checks proves nothing.

    Raises:
        ValueError: for an argument out of range.
    """
    norm, seed = norm_name(norm), integer("seed", seed)
    eps = radius_or_default(eps, norm, bounds)
    _check_arguments(eps, eps_factors, steps, slack)
    queries, eot = integer("queries", queries, at_least=1), integer("eot", eot, at_least=1)
    samples = as_samples(data, bounds, max_examples)
    eps, other = check_eps(eps, norm, samples), as_surrogate(surrogate)
    doubts_about(model)
    models = [model] if other is None else [model, other.model]
    with all_in_evaluation_mode(models, device) as where:
        size = check_batch_size(batch_size)
        work = SharedWork(ProgressDisplay(progress))
        runner = Runner(model, samples, norm, size, where, seed, work, passes=eot)
        check_labels(runner)
        probe = _Probe(runner, runner.clean().robust)
        factors = _factors_within_reach(runner, eps, eps_factors)
        over_eps, *others = _of_pgd(probe, eps, factors, steps, slack)
        loss = rising_loss(probe.losses(eps, factors, steps[-1]), slack)
        first = [_random(runner), _useless_gradients(probe, slack)]
        black_box = _black_box(probe, eps, steps[-1], queries, slack, other)
    return [*first, over_eps, loss, *others, *black_box]


class _Probe:
    """PGD at many radii and numbers of steps, each run once."""

    def __init__(self, runner: Runner, correct: Tensor) -> None:
        self.runner, self.correct = runner, correct
        self.clean = float(correct.double().mean())
        self.on_the_way = Violations()  # of all runs of PGD
        self._found: dict[tuple[float, int], tuple[float, float]] = {}

    def accuracy(self, eps: float, steps: int) -> float:
        """Share of all images that PGD does not break."""
        return self._run(eps, steps)[0]

    def losses(self, eps: float, factors: Sequence[float], steps: int) -> list[tuple[float, float]]:
        """(radius, mean loss) over the images that are classified correctly, beginning with radius 0."""
        total = 0.0
        for indices in self.runner.batches("loss", self.correct.nonzero().flatten()):
            total += self._loss(*self.runner.samples.take(indices, self.runner.device))
        clean = total / max(int(self.correct.sum()), 1)
        return [(0.0, clean), *((eps * f, self._run(eps * f, steps)[1]) for f in factors)]

    def _run(self, eps: float, steps: int) -> tuple[float, float]:
        """Accuracy, and the mean loss at the last points of PGD."""
        if (eps, steps) not in self._found:
            runner, left, total = self.runner, self.correct.clone(), 0.0
            attack = BallAttack(f"pgd-{steps}", steps=steps, alpha=eps / 4, random_start=True)
            (perturb,) = runner.perturbations(attack, eps)
            last = LastPoints.of(attack, runner.model, runner.seed, len(runner.samples))
            assert last is not None  # PGD starts at random
            audit = Audit(eps, runner.norm, runner.samples.bounds)
            for indices in runner.batches(attack.name, self.correct.nonzero().flatten()):
                x, y = runner.samples.take(indices, runner.device)
                adv = admissible_or_clean(x, perturb(x, y, indices, audit), audit)
                right = predict(runner.model, adv) == y
                left[indices] = right.cpu()
                audit.count_blind(*last.count(adv, y, right, indices))
                total += self._loss(adv, y)
            if problems := audit.problems():
                raise RuntimeError(
                    f"{attack.name} returned inadmissible images: {'; '.join(problems)}"
                )
            mean = total / max(int(self.correct.sum()), 1)
            self.on_the_way += audit.found
            self._found[eps, steps] = float(left.double().mean()), mean
        return self._found[eps, steps]

    def _loss(self, x: Tensor, y: Tensor) -> float:
        logits = logits_of(self.runner.model, x).double()
        return float(nn.functional.cross_entropy(logits, y, reduction="sum"))

    def useless_gradients(self) -> int:
        """The number of correctly classified images with a useless gradient."""
        count = 0
        for indices in self.runner.batches("gradients", self.correct.nonzero().flatten()):
            x, y = self.runner.samples.take(indices, self.runner.device)
            with torch.enable_grad():
                leaf = x.clone().requires_grad_()
                (grad,) = torch.autograd.grad(entropy_sum(self.runner.model(leaf), y), leaf)
            count += count_useless_gradients(grad)
        return count


def _of_pgd(
    probe: _Probe, eps: float, factors: Sequence[float], steps: Sequence[int], slack: float
) -> list[Finding]:
    """Accuracy over eps and over steps, and with any image allowed."""
    by_eps = [(0.0, probe.clean), *((eps * f, probe.accuracy(eps * f, steps[-1])) for f in factors)]
    by_steps = [(float(count), probe.accuracy(eps, count)) for count in steps]
    any_image = _any_image(probe.runner)
    return [
        monotone("eps", by_eps, slack),
        monotone("steps", by_steps, slack),
        unbounded(any_image, probe.accuracy(any_image, steps[-1]), slack),
    ]


def _factors_within_reach(runner: Runner, eps: float, factors: Sequence[float]) -> list[float]:
    """The factors of eps whose balls are not larger than the ball that holds any image."""
    return [factor for factor in factors if eps * factor <= _any_image(runner)]


def _any_image(runner: Runner) -> float:
    """The radius of a ball that holds any image."""
    samples = runner.samples
    return largest_radius(samples.bounds, runner.norm, math.prod(samples.image_shape))


def _random(runner: Runner) -> Finding:
    if runner.draws():
        message = (
            "the model draws random numbers: two passes over the same images differ; average gradients over "
            "several passes (eot)"
        )
        return Finding("random", False, message, ())
    return Finding("random", True, "two passes over the same images agree", ())


def _useless_gradients(probe: _Probe, slack: float) -> Finding:
    """Gradients at the images, and at the points of all runs of PGD so far."""
    count, n = probe.useless_gradients(), max(int(probe.correct.sum()), 1)
    met = probe.on_the_way
    later = met.blind / max(met.followed, 1)
    doubts = nan_warnings(met.nan_points, met.nan_gradients)
    if met.blind:
        doubts.insert(
            0,
            f"{met.blind} of the {met.followed} images that withstood a run of PGD have a gradient that is zero "
            "everywhere or not finite at its last point",
        )
    if count:
        doubts.insert(
            0,
            f"{count} of the {n} images that are classified correctly have a gradient that is zero everywhere "
            "or not finite",
        )
    ok = max(count / n, later) <= slack and not met.nan_gradients and not met.nan_points
    message = "; ".join(doubts) or "every image that is classified correctly has a gradient"
    return Finding("gradients", ok, message, ((0.0, count / n), (1.0, later)))


def _black_box(
    probe: _Probe, eps: float, steps: int, queries: int, slack: float, other: Surrogate | None
) -> list[Finding]:
    """Compare Square, and PGD on a surrogate, with Auto-PGD."""
    runner, n = probe.runner, len(probe.correct)
    white = BallAttack(f"apgd-ce-{steps}", steps, None, random_start=True, kind="apgd")
    accuracy = float(runner.gradient(white, eps, probe.correct).robust.double().mean())
    rivals: list[tuple[str, float]] = []
    if runner.samples.take(torch.tensor([0], device="cpu"), runner.device)[0].dim() == 4:
        square = BallAttack(f"square-{queries}", queries, None, True, kind="square", loss="cw")
        left = runner.gradient(square, eps, probe.correct).robust
        rivals.append((square.name, int(left.sum()) / n))
    if other is not None:
        pgd = BallAttack(f"pgd-{steps}", steps, alpha=eps / 4, random_start=True)
        left = replace(runner, surrogate=other.model).gradient(pgd, eps, probe.correct).robust
        rivals.append((f"{pgd.name} made on {other.name}", int(left.sum()) / n))
    findings = []
    for name, found in rivals:
        ok = found >= accuracy - slack - ROUNDING
        message = (
            f"{name} leaves {100 * found:.2f} %, Auto-PGD of {steps} steps {100 * accuracy:.2f} %"
            + ("" if ok else ": an attack without the model's gradients is the stronger one")
        )
        findings.append(Finding("black box", ok, message, ((0.0, accuracy), (1.0, found))))
    return findings


def _check_arguments(
    eps: float, eps_factors: Sequence[float], steps: Sequence[int], slack: float
) -> None:
    if not limit("eps", eps) > 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    if not 0 <= number("slack", slack) < 1:
        raise ValueError(f"slack must be in [0, 1), got {slack}")
    for name, values in (("eps_factors", eps_factors), ("steps", steps)):
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise TypeError(f"{name} must be a sequence of numbers, got {shown(values)}")
        for value in values:
            (integer if name == "steps" else limit)(name, value)
        if not values or values[0] <= 0 or any(b <= a for a, b in pairwise(values)):
            raise ValueError(f"{name} must be positive and increasing, got {tuple(values)}")
