"""Running attacks over a data set: which images a model still classifies correctly after each attack."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.attacks import APGD, FAB, MIM, PGD, Square
from fastadv.attacks.attack import Attack
from fastadv.engine import randomness
from fastadv.evaluation.attack_list import BallAttack, UserAttack
from fastadv.evaluation.context import Model, private_generators
from fastadv.evaluation.last_points import LastPoints
from fastadv.evaluation.logit_probe import are_alike, contents_of, probe_logits
from fastadv.evaluation.progress import ProgressDisplay
from fastadv.evaluation.samples import Samples
from fastadv.evaluation.shared_work import SharedWork
from fastadv.evaluation.verify import Audit, admissible_or_clean, logits_of
from fastadv.evaluation.worst import WorstImages, WorstKeeper
from fastadv.files import file_key
from fastadv.seeding import derive_seed

# (x, y, indices of the images in the data, counts of the run) -> adversarial images
Perturb = Callable[[Tensor, Tensor, Tensor, Audit], Tensor]
_COUNTS = ("nan_points", "nan_gradients", "followed", "blind")  # of an outcome and of an audit
# To recognise a random model: images, passes over them, and passes where a generator changes.
_CHECKED, _PASSES, _MOST_PASSES = 16, 8, 64


@dataclass(frozen=True)
class Outcome:
    """The images that withstand an attack.

    Attributes:
        robust: [N] bool on the CPU; false also where the clean image is classified wrongly.
        problems: violations by the returned images, one sentence each.
        seconds: wall-clock time.
        notes: further notes, one sentence each.
        nan_points: points that the attack passed over, because the attacked model returned NaN there.
        nan_gradients: elements of the gradients that the attack followed that were NaN or infinite.
        followed: images that withstood the attack, and whose gradient at its last point was looked at.
        blind: those among them whose gradient there is useless.
    """

    robust: Tensor
    problems: tuple[str, ...]
    seconds: float
    notes: tuple[str, ...] = ()
    nan_points: int = 0
    nan_gradients: int = 0
    followed: int = 0
    blind: int = 0

    def with_counts_of(self, others: Sequence[Outcome]) -> Outcome:
        """This outcome with the counts of several in place of its own."""
        sums = {name: sum(getattr(one, name) for one in others) for name in _COUNTS}
        return replace(self, **sums)


@dataclass(frozen=True)
class Runner:
    """A model, already in evaluation mode, and the data and settings common to all attacks on it.

    Attributes:
        model: the judged model.
        samples: images and labels.
        norm: norm of the perturbations.
        batch_size: images per pass.
        device: device of the models and of the attacks.
        seed: seed of the random numbers.
        work: splits the images into batches and among processes.
        surrogate: the model on which adversarial images are made, in evaluation mode; None is the judged model.
        passes: number of passes through the network for each gradient, which is their mean.
        worst: keeps the worst images of each attack.
    """

    model: Model
    samples: Samples
    norm: str
    batch_size: int
    device: torch.device
    seed: int
    work: SharedWork = field(default_factory=SharedWork)
    surrogate: Model | None = None
    passes: int = 1
    worst: WorstKeeper = field(default_factory=WorstKeeper)

    @property
    def progress(self) -> ProgressDisplay:
        """The display of the progress."""
        return self.work.progress

    @property
    def source(self) -> Model:
        """The model on which adversarial images are made."""
        return self.model if self.surrogate is None else self.surrogate

    def draws(self) -> bool:
        """Whether the model draws random numbers: two passes over the same images differ.

        A model that draws one bit per pass can draw the same bit in several passes. Therefore there are more than
        two passes, and many where the state of a generator changes. torch's generators are restored afterwards.
        """
        first = torch.arange(min(len(self.samples), _CHECKED, self.batch_size), device="cpu")
        x, _ = self.samples.take(first, self.device)
        with private_generators(derive_seed(self.seed, "evaluate/draws")):
            before = randomness.generator_states(self.model, self.device)
            one = logits_of(self.model, x.clone())
            moved = randomness.generator_states(self.model, self.device) != before
            for _ in range(1, _MOST_PASSES if moved else _PASSES):
                # Kernels that add in a different order in each pass differ by rounding only.
                other = logits_of(self.model, x.clone())
                if not torch.allclose(one, other, rtol=1e-4, atol=1e-5):
                    return True
        return False

    def clean(self) -> Outcome:
        """Which images are classified correctly without an attack."""
        start = time.perf_counter()

        def right(indices: Tensor) -> Tensor:
            x, y = self.samples.take(indices, self.device)
            return self.predicted(x, "clean", indices) == y

        every = torch.arange(len(self.samples), device="cpu")
        correct = self.collect("clean", file_key("clean"), every, right).bool()
        return Outcome(correct, (), time.perf_counter() - start)

    def gradient(self, attack: BallAttack, eps: float, correct: Tensor) -> Outcome:
        """Run an attack of this package on the images that are classified correctly.

        A restart attacks only the images that the restarts before it have not broken. A whole run attacks all.

        Raises:
            RuntimeError: when an adversarial image is not admissible, which is a fault of this package.
        """
        if attack.runs > 1:
            return self._lowest_run(attack, eps, correct)
        return self._in_turn(attack, self.perturbations(attack, eps), eps, correct)

    def perturbations(self, attack: BallAttack | UserAttack, eps: float) -> list[Perturb]:
        """Functions that make adversarial images, one for each restart or whole run of an attack."""
        if isinstance(attack, UserAttack):
            return [self._perturb_by_user(attack)]
        method = self._make(attack, eps)
        # Whole runs have the same seeds as restarts of the same number, so that the two can be compared.
        seed = derive_seed(self.seed, f"evaluate/{attack.name.removesuffix('runs')}")
        return [
            partial(_perturbed, method, derive_seed(seed, "restart", number) if number else seed)
            for number in range(attack.restarts * attack.runs)
        ]

    def _in_turn(
        self,
        attack: BallAttack,
        perturbations: Sequence[Perturb],
        eps: float,
        correct: Tensor,
        first: int = 0,
    ) -> Outcome:
        """Run the perturbations in order, each on the images that are left; their numbers begin at ``first``."""
        outcome = Outcome(correct, (), 0.0)
        for number, perturb in enumerate(perturbations, first):
            key = file_key(attack.name, attack, eps, number)
            found = self._attack(attack.name, key, perturb, eps, outcome.robust, attack)
            if found.problems:
                raise RuntimeError(
                    f"{attack.name} returned inadmissible images: {'; '.join(found.problems)}"
                )
            outcome = replace(found, seconds=outcome.seconds + found.seconds).with_counts_of(
                (outcome, found)
            )
        return outcome

    def _lowest_run(self, attack: BallAttack, eps: float, correct: Tensor) -> Outcome:
        """Run all whole runs, and return the one that leaves the fewest images."""
        runs = [
            self._in_turn(attack, [perturb], eps, correct, number)
            for number, perturb in enumerate(self.perturbations(attack, eps))
        ]
        left = [int(run.robust.sum()) for run in runs]
        note = (
            f"the lowest of {len(runs)} whole runs, which left {min(left)} to {max(left)} images, "
            f"{sum(left) / len(left):.1f} on average"
        )
        return replace(
            runs[left.index(min(left))],
            seconds=sum(run.seconds for run in runs),
            notes=(note,),
        ).with_counts_of(runs)

    def _make(self, attack: BallAttack, eps: float) -> Attack:
        """The attack on the plain source model in float32, with gradients that are means over the passes."""
        method = self._bare(attack, eps)
        method.passes = self.passes
        return method

    def _bare(self, attack: BallAttack, eps: float) -> Attack:
        common: dict[str, Any] = dict(
            norm=self.norm,
            bounds=self.samples.bounds,
            precision="fp32",
            engine="eager",
        )
        if attack.kind in ("fab", "fab-t"):
            if attack.kind == "fab":
                common["target_classes"] = None
            return FAB(self.source, eps, attack.steps, **common)
        common["loss"] = attack.loss
        if attack.kind == "square":
            return Square(self.source, eps, attack.steps, **common)
        if attack.kind == "apgd":
            return APGD(self.source, eps, attack.steps, **common)
        assert attack.alpha is not None
        if attack.kind == "mim":
            return MIM(self.source, eps, attack.alpha, attack.steps, **common)
        return PGD(self.source, eps, attack.alpha, attack.steps, attack.random_start, **common)

    def user_attack(self, attack: UserAttack, eps: float, correct: Tensor) -> Outcome:
        """Run the user's callable on the images that are classified correctly.

        torch's generators are seeded for each batch and restored afterwards.

        Raises:
            RuntimeError: when the callable changed the model's parameters, buffers or function.
        """
        (perturb,) = self.perturbations(attack, eps)
        return self._attack(attack.name, None, perturb, eps, correct)

    def _perturb_by_user(self, attack: UserAttack) -> Perturb:
        before, logits = contents_of(self.source), probe_logits(self.source, self.samples)

        def perturb(x: Tensor, y: Tensor, indices: Tensor, audit: Audit) -> Tensor:
            seed = derive_seed(self.seed, f"evaluate/{attack.name}", int(indices[0]))
            with private_generators(seed):
                adv = attack.attack(self.source, x.clone(), y.clone())
            if isinstance(self.source, nn.Module):
                self.source.eval()
            if contents_of(self.source) != before:
                raise RuntimeError(
                    f"attack {attack.name!r} changed the model's parameters or buffers"
                )
            self._check_logits(attack, logits)
            return adv

        return perturb

    def _check_logits(self, attack: UserAttack, before: Tensor | None) -> None:
        """Refuse an attack after which the model computes something else; None if that cannot be compared."""
        if before is not None and not are_alike(before, probe_logits(self.source, self.samples)):
            raise RuntimeError(
                f"attack {attack.name!r} changed the results of the model, such as by a hook that it left"
            )

    def predicted(self, x: Tensor, purpose: str, indices: Tensor) -> Tensor:
        """The classes [B] that the judged model predicts, from `logits_of`."""
        return self.logits_of(x, purpose, indices).argmax(dim=1)

    def logits_of(self, x: Tensor, purpose: str, indices: Tensor) -> Tensor:
        """The judged model's logits. The random numbers of a random model follow from seed, purpose and images."""
        seed = derive_seed(self.seed, f"evaluate/judge/{purpose}", int(indices[0]))
        with private_generators(seed):
            return logits_of(self.model, x)

    def misjudged(self, indices: Tensor, adversarial: Tensor) -> Tensor:
        """Which adversarial images of a surrogate the judged model misclassifies.

        Args:
            indices: indices of the images, int64 [M] on the CPU.
            adversarial: their adversarial images, [M, ...].

        Returns:
            [N] bool on the CPU, false for all other images.
        """
        wrong = torch.zeros(len(self.samples), dtype=torch.bool, device="cpu")
        every_row = torch.arange(len(indices), device="cpu")
        for rows in every_row.split(self.batch_size) if len(indices) else ():
            _, y = self.samples.take(indices[rows], self.device)
            adv = adversarial[rows].to(self.device)
            wrong[indices[rows]] = (self.predicted(adv, "misjudged", indices[rows]) != y).cpu()
        return wrong

    def _attack(
        self,
        name: str,
        key: str | None,
        perturb: Perturb,
        eps: float,
        correct: Tensor,
        attack: BallAttack | None = None,
    ) -> Outcome:
        """One run on the images that are classified correctly; ``key`` identifies its finished batches."""
        start = time.perf_counter()
        audit = Audit(eps, self.norm, self.samples.bounds)
        kept = self.work.finished if key else None
        last = LastPoints.of(attack, self.source, self.seed, len(self.samples))

        def left(indices: Tensor) -> Tensor:
            x, y = self.samples.take(indices, self.device)
            adv = admissible_or_clean(x, perturb(x, y, indices, audit), audit)
            logits = self.logits_of(adv, name, indices)
            seen = self.worst.see(name, x, adv, y, logits, indices)
            if kept is not None and seen is not None and len(seen):
                kept.save_worst(str(key), indices, seen)
            right = logits.argmax(dim=1) == y
            if last is not None:
                audit.count_blind(*last.count(adv, y, right, indices))
            return right

        def again(indices: Tensor) -> None:
            if kept is None or not self.worst.keep:
                return
            path = kept.worst_path(str(key), indices)
            if path.exists():
                self.worst.add(name, WorstImages.load(path))

        robust, indices = correct.clone(), correct.nonzero().flatten()
        share = len(indices) / len(correct)
        robust[indices] = self.collect(
            name, key, indices, left, audit=audit, share=share, again=again
        ).bool()
        return Outcome(
            robust,
            tuple(audit.problems()),
            time.perf_counter() - start,
            **{name: getattr(audit.found, name) for name in _COUNTS},
        )

    def worst_of(
        self, name: str, attacked: Tensor, fooled: Tensor, adversarial: Tensor
    ) -> WorstImages | None:
        """The worst images of an ensemble, where any are kept. All ranks must call this.

        Args:
            name: name of the attack.
            attacked: indices of the images that it got, [N].
            fooled: which of these it broke, [M].
            adversarial: the adversarial images of these, [M, ...].
        """
        if self.worst.keep and len(fooled):
            for part in torch.arange(len(fooled), device="cpu").split(self.batch_size):
                indices = attacked[fooled[part]]
                x, y = self.samples.take(indices, self.device)
                adv = adversarial[part].to(self.device)
                self.worst.see(name, x, adv, y, self.logits_of(adv, name, indices), indices)
        return self.take_worst(name)

    def take_worst(self, name: str) -> WorstImages | None:
        """Return the worst images of an attack over all ranks, and forget them. All ranks must call this."""
        own = self.worst.take(name)
        if not self.worst.keep:
            return None
        return self.worst.worst_of_all(self.work.ranks.gather_objects(own))

    def batches(self, label: str, indices: Tensor) -> Iterator[Tensor]:
        """The indices of images batch by batch, with a bar."""
        batches = self.samples.batches(self.batch_size, indices)
        return self.progress.bar(batches, label, len(batches))

    def collect(
        self,
        name: str,
        key: str | None,
        indices: Tensor,
        values_of: Callable[[Tensor], Tensor],
        *,
        audit: Audit | None = None,
        share: float = 1.0,
        again: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Call `SharedWork.collect` with a bar that shows the accuracy so far.

        ``share`` is the share of the images among all images; the others count as wrong.
        """
        self.samples.source.expect(self.work.own(indices))
        return self.work.collect(
            name,
            key,
            indices,
            self.batch_size,
            values_of,
            audit=audit,
            done=lambda mean: {"accuracy so far": f"{100 * share * mean:.2f} %"},
            again=again,
        )


def _perturbed(
    method: Attack, seed: int, x: Tensor, y: Tensor, indices: Tensor, audit: Audit
) -> Tensor:
    # Random numbers by image index: the result does not depend on the batches.
    adv = method(x, y, seed=seed, sample_ids=indices.to(x.device))
    audit.count_nan(method.last.nan_points, method.last.nan_gradients)
    return adv
