"""Running attacks over a data set: which images a model still gets right after them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.attacks import APGD, FAB, MIM, PGD, Square
from fastadv.attacks.attack import Attack as Method
from fastadv.engine.layout import naming_layout
from fastadv.evaluation.attack_list import Foreign, Gradient
from fastadv.evaluation.context import Model, private_generators
from fastadv.evaluation.progress import Progress
from fastadv.evaluation.samples import Samples
from fastadv.evaluation.verify import Audit, logits_of, predict
from fastadv.seeding import derive_seed

# (x, y, indices of the images in the data) -> adversarial images
Perturb = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """What an attack left of a model's accuracy.

    Attributes:
        robust: [N] bool on the CPU; false also where the clean image is classified wrongly.
        problems: violations found, one sentence each.
        seconds: wall-clock time.
    """

    robust: Tensor
    problems: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Runner:
    """A model, already in evaluation mode, and the data and settings common to all attacks on it."""

    model: Model
    samples: Samples
    norm: str
    batch_size: int
    device: torch.device
    seed: int
    progress: Progress = field(default_factory=lambda: Progress(False))

    def check_labels(self) -> int:
        """Require that the model knows all labels, and return its number of classes.

        Raises:
            ValueError: when a label is too large, the data set has more classes, or the channels come last.
        """
        x, _ = self.samples.take(torch.tensor([0]), self.device)
        with naming_layout("images", self.model, x):
            classes = logits_of(self.model, x).shape[1]
        largest = int(self.samples.labels.max())
        if largest >= classes:
            raise ValueError(f"labels must be below the model's {classes} classes, got {largest}")
        known = self.samples.num_classes
        if known is not None and known > classes:
            raise ValueError(
                f"model must have the {known} classes of {self.samples.name!r}, got {classes} logits"
            )
        return classes

    def clean(self) -> Outcome:
        """Which images are classified correctly without an attack."""
        start = time.perf_counter()
        correct = torch.zeros(len(self.samples), dtype=torch.bool)
        for indices in self._bar("clean", torch.arange(len(self.samples))):
            x, y = self.samples.take(indices, self.device)
            correct[indices] = (predict(self.model, x) == y).cpu()
        return Outcome(correct, (), time.perf_counter() - start)

    def gradient(self, attack: Gradient, eps: float, correct: Tensor) -> Outcome:
        """Run an attack of this package on the images that are classified correctly.

        A restart attacks only the images that those before it have left.

        Raises:
            RuntimeError: when an adversarial image is not admissible, which is a fault of this package.
        """
        method = self._make(attack, eps)
        seed = derive_seed(self.seed, f"evaluate/{attack.name}")
        outcome = Outcome(correct, (), 0.0)
        for restart in range(attack.restarts):
            outcome = self._run(attack.name, method, seed, restart, eps, outcome)
        return outcome

    def _run(
        self, name: str, method: Method, seed: int, restart: int, eps: float, so_far: Outcome
    ) -> Outcome:
        """One run from one start, on what is left."""
        run_seed = derive_seed(seed, "restart", restart) if restart else seed

        def perturb(x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
            # Noise by image index: the result does not depend on how the images are batched.
            return method(x, y, seed=run_seed, sample_ids=indices.to(x.device))

        outcome = self._attack(name, perturb, eps, so_far.robust)
        if outcome.problems:
            raise RuntimeError(
                f"{name} returned inadmissible images: {'; '.join(outcome.problems)}"
            )
        return replace(outcome, seconds=so_far.seconds + outcome.seconds)

    def _make(self, attack: Gradient, eps: float) -> Method:
        """The attack, on the model's own operations and in float32."""
        common: dict[str, Any] = dict(
            norm=self.norm,
            bounds=self.samples.bounds,
            precision="fp32",
            engine="eager",
        )
        if attack.kind in ("fab", "fab-t"):
            if attack.kind == "fab":
                common["target_classes"] = None
            return FAB(self.model, eps, attack.steps, **common)
        common["loss"] = attack.loss
        if attack.kind == "square":
            return Square(self.model, eps, attack.steps, **common)
        if attack.kind == "apgd":
            return APGD(self.model, eps, attack.steps, **common)
        assert attack.alpha is not None
        if attack.kind == "mim":
            return MIM(self.model, eps, attack.alpha, attack.steps, **common)
        return PGD(self.model, eps, attack.alpha, attack.steps, attack.random_start, **common)

    def foreign(self, attack: Foreign, eps: float, correct: Tensor) -> Outcome:
        """Run a callable of the user's on the images that are classified correctly.

        torch's generators are seeded per batch and restored afterwards.

        Raises:
            RuntimeError: when the callable changed parameters or buffers of the model.
        """
        before = _versions(self.model)

        def perturb(x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
            with private_generators(
                derive_seed(self.seed, f"evaluate/{attack.name}", int(indices[0]))
            ):
                adv = attack.attack(self.model, x.clone(), y.clone())
            if isinstance(self.model, nn.Module):
                self.model.eval()
            if _versions(self.model) != before:
                raise RuntimeError(
                    f"attack {attack.name!r} changed the model's parameters or buffers"
                )
            return adv

        return self._attack(attack.name, perturb, eps, correct)

    def _attack(self, name: str, perturb: Perturb, eps: float, correct: Tensor) -> Outcome:
        start = time.perf_counter()
        audit = Audit(eps, self.norm, self.samples.bounds)
        robust = correct.clone()
        for indices in self._bar(name, correct.nonzero().flatten()):
            x, y = self.samples.take(indices, self.device)
            adv = admissible_or_clean(x, perturb(x, y, indices), audit)
            robust[indices] = (predict(self.model, adv) == y).cpu()
        return Outcome(robust, tuple(audit.problems()), time.perf_counter() - start)

    def _bar(self, label: str, indices: Tensor) -> Iterator[Tensor]:
        batches = self.samples.batches(self.batch_size, indices)
        return self.progress.bar(batches, label, len(batches))


def admissible_or_clean(x: Tensor, adv: Tensor, audit: Audit) -> Tensor:
    """Adversarial images in float32 [B, ...], with the clean image where the audit rejects one."""
    if isinstance(adv, Tensor) and adv.is_floating_point():
        adv = adv.detach().to(x.device, torch.float32)
    valid = audit.check(x, adv)
    return torch.where(valid.view(-1, *[1] * (x.dim() - 1)), adv, x)


def _versions(model: Model) -> tuple[int, ...]:
    """How often each parameter and buffer was changed in place, as torch counts it."""
    if not isinstance(model, nn.Module):
        return ()
    return tuple(tensor._version for tensor in chain(model.parameters(), model.buffers()))
