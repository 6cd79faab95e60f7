"""Black-box transfer: adversarial images that are made on one model and judged by another."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastadv.attacks.options import names_checked
from fastadv.evaluation.attack_list import (
    STOPS_EARLY,
    AttackChoice,
    BallAttack,
    Clean,
    Ensemble,
    Minimum,
    UserAttack,
    check_fewest_classes,
    parse_attacks,
    stops_early,
)
from fastadv.evaluation.context import Model, all_in_evaluation_mode
from fastadv.evaluation.early_checks import check_labels, seems_to_guess
from fastadv.evaluation.model_doubts import doubts_about
from fastadv.evaluation.progress import ProgressDisplay
from fastadv.evaluation.report import library_versions
from fastadv.evaluation.rows import autoattack_of
from fastadv.evaluation.runner import Runner
from fastadv.evaluation.samples import (
    as_samples,
    check_batch_size,
    check_eps,
    radius_or_default,
)
from fastadv.evaluation.shared_work import SharedWork
from fastadv.evaluation.transfer_table import TransferMatrix
from fastadv.evaluation.verify import Audit, admissible_or_clean
from fastadv.ops.values import integer, limit, norm_name, shown


@dataclass(frozen=True)
class Surrogate:
    """A model on which adversarial images for another model are made.

    Attributes:
        model: a model as for ``evaluate``, with the same classes as the judged model.
        name: its name in a report; by default the model's class.
    """

    model: Model
    name: str = ""

    def __post_init__(self) -> None:
        if not callable(self.model):
            raise TypeError(f"surrogate must be a model, got {type(self.model).__name__}")
        object.__setattr__(self, "name", self.name or type(self.model).__name__)


def as_surrogate(surrogate: Surrogate | Model | None) -> Surrogate | None:
    """Return a surrogate; a model without a name gets the name of its class.

    Raises:
        TypeError: it is not a model.
    """
    if surrogate is None or isinstance(surrogate, Surrogate):
        return surrogate
    return Surrogate(surrogate)


def check_transferable(
    attack: AttackChoice, eps: float, alpha: float | None
) -> BallAttack | Ensemble | UserAttack:
    """Require an attack in a ball, run once per image or with restarts.

    Raises:
        ValueError: for another attack, or an unknown name.
    """
    if not isinstance(attack, str | tuple | list) or not attack:
        raise TypeError(f"attack must be a name or a pair (name, callable), got {shown(attack)}")
    parsed = parse_attacks(attack, eps, alpha)
    found = parsed[0]
    if (
        len(parsed) > 1
        or isinstance(found, (Clean, Minimum))
        or (isinstance(found, BallAttack) and found.runs > 1)
    ):
        name = attack if isinstance(attack, str) else attack[0]
        raise ValueError(
            f"attack must be one attack in a ball, such as pgd-20 or autoattack, got {name!r}"
        )
    return found


@names_checked
def transfer_matrix(
    models: Mapping[str, Model],
    data: Any,
    attack: AttackChoice = "pgd-20",
    *,
    eps: float | None = None,
    alpha: float | None = None,
    norm: str = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 256,
    device: torch.device | str | None = None,
    seed: int = 0,
    max_examples: int | None = None,
    progress: bool = True,
) -> TransferMatrix:
    """Make adversarial images on each of several models, and judge them by every model.

    The accuracy of a pair equals the accuracy by ``evaluate(target, data, attack, surrogate=source)``: among all
    images, including the images that the target misclassifies without an attack. The images are made once for all
    targets.

    Args:
        models: at least two models by name, as for ``evaluate``; all with the same classes.
        data: as for ``evaluate``.
        attack: a name or a pair as for ``evaluate``, of an attack in a ball.
        eps: radius of the ball; by default 8/255, in linf within bounds (0, 1) alone.
        alpha: step size of PGD, C&W and MIM; by default eps / 4.
        norm: norm of the ball.
        bounds: range of image values.
        batch_size: images per pass.
        device: device of the run; by default the device of the first model.
        seed: seed of the random numbers.
        max_examples: use only so many images, as for ``evaluate``.
        progress: bars on a terminal, one line per model elsewhere; false for silence.

    Returns:
        The matrix.

    Raises:
        ValueError: for fewer than two models, models of different classes, an attack without a ball, or an
            argument out of range.
        TypeError: for an argument of the wrong kind.
        RuntimeError: when one of this package's attacks returned an inadmissible image.
    """
    start = time.perf_counter()
    _check_models(models)
    norm, seed = norm_name(norm), integer("seed", seed)
    eps = limit("eps", radius_or_default(eps, norm, bounds))
    alpha = None if alpha is None else limit("alpha", alpha)
    chosen = check_transferable(attack, eps, alpha)
    samples = as_samples(data, bounds, max_examples)
    eps, say = check_eps(eps, norm, samples), ProgressDisplay(progress)
    notes = [f"{chosen.name}: {STOPS_EARLY}"] if stops_early(chosen) else []
    notes += _doubts(models)
    with all_in_evaluation_mode(list(models.values()), device) as where:
        runners = [
            Runner(model, samples, norm, check_batch_size(batch_size), where, seed, SharedWork(say))
            for model in models.values()
        ]
        classes = _check_classes(list(models), runners, chosen)
        clean = [runner.clean().robust for runner in runners]
        notes += _guessing(models, clean, classes)
        rows: list[tuple[int, ...]] = []
        for name, source in zip(models, runners, strict=True):
            robust, problems = _judged(chosen, eps, source, runners, clean)
            rows.append(tuple(int(flags.sum()) for flags in robust))
            notes += [f"{chosen.name} on {name}: {problem}" for problem in problems]
            say.line(f"{chosen.name} made on {name}: {_shares(models, rows[-1], len(samples))}")
    return TransferMatrix(
        attack=chosen.name,
        names=tuple(models),
        correct=tuple(rows),
        clean=tuple(int(flags.sum()) for flags in clean),
        n=len(samples),
        eps=eps,
        norm=norm,
        bounds=samples.bounds,
        seed=seed,
        alpha=chosen.alpha if isinstance(chosen, BallAttack) else None,
        data=samples.name,
        seconds=time.perf_counter() - start,
        notes=tuple(notes),
        versions=library_versions(),
    )


def _check_models(models: Mapping[str, Model]) -> None:
    """Require two or more models by name."""
    if not isinstance(models, Mapping) or len(models) < 2:
        raise ValueError(f"models must be two or more in a dict, by name, got {shown(models)}")
    for name in models:
        if not isinstance(name, str):
            raise TypeError(f"models must have names that are text, got {shown(name)}")


def _guessing(names: Iterable[str], clean: Sequence[Tensor], classes: int) -> list[str]:
    """The notes about models that seem to guess, by whether each image is classified correctly, [N] bool."""
    return [
        f"{name} seems to guess, so the images that are made on it say nothing about the other models"
        for name, right in zip(names, clean, strict=True)
        if seems_to_guess(int(right.sum()), len(right), classes)
    ]


def _shares(names: Iterable[str], correct: Sequence[int], images: int) -> str:
    """The accuracies of all models on the images that one model made, in words."""
    return ", ".join(
        f"{100 * count / images:.2f} % on {name}"
        for name, count in zip(names, correct, strict=True)
    )


def _doubts(models: Mapping[str, Model]) -> list[str]:
    """Warn about models in a mode that puts figures in doubt, and return the notes."""
    found: list[str] = []
    for name, model in models.items():
        found += doubts_about(model, f"model {name}")
    return found


def _check_classes(
    names: Sequence[str], runners: Sequence[Runner], attack: BallAttack | Ensemble | UserAttack
) -> int:
    """Require that all models have the same classes, and return their number."""
    classes = [check_labels(runner, name) for name, runner in zip(names, runners, strict=True)]
    for name, count in zip(names, classes, strict=True):
        if count != classes[0]:
            raise ValueError(
                f"models must have the same classes, got {classes[0]} of {names[0]} and {count} of {name}"
            )
    check_fewest_classes([attack], classes[0])
    return classes[0]


def _judged(
    attack: BallAttack | Ensemble | UserAttack,
    eps: float,
    source: Runner,
    targets: Sequence[Runner],
    clean: Sequence[Tensor],
) -> tuple[list[Tensor], list[str]]:
    """For each target, the source's adversarial images that it classifies correctly, [N] bool; and notes."""
    samples, robust = source.samples, [flags.clone() for flags in clean]
    if isinstance(attack, Ensemble):
        indices = torch.stack(robust).any(0).nonzero().flatten()
        if len(indices) == 0:
            return robust, []
        result = autoattack_of(source, indices, eps)
        for flags, target in zip(robust, targets, strict=True):
            flags &= ~target.misjudged(indices[result.fooled], result.adversarial)
        return robust, list(result.notes)
    audit = Audit(eps, source.norm, samples.bounds)
    for perturb in source.perturbations(attack, eps):
        left = torch.stack(robust).any(0).nonzero().flatten()
        for indices in source.batches(attack.name, left):
            x, y = samples.take(indices, source.device)
            adv = admissible_or_clean(x, perturb(x, y, indices, audit), audit)
            for flags, target in zip(robust, targets, strict=True):
                flags[indices] &= (target.predicted(adv, attack.name, indices) == y).cpu()
    problems = audit.problems()
    if problems and isinstance(attack, BallAttack):
        raise RuntimeError(f"{attack.name} returned inadmissible images: {'; '.join(problems)}")
    return robust, [*problems, *audit.doubts()]
