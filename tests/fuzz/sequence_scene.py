"""Who takes part in a sequence: models, attacks on them, and what surrounds their calls."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sequence_subject import Subject, settle_statistics
from torch import Tensor, nn

import fastadv
from fastadv.attacks import Attack

EPS = {"linf": 0.01, "l2": 0.1, "l1": 1.0}  # so small that gradients hardly change on the way


@dataclass
class Victim:
    """A model.

    Attributes:
        subject: the network.
        outer: the network in its wrappers, which is attacked.
        dtype: of its weights.
    """

    subject: Subject
    outer: Any
    dtype: torch.dtype = torch.float32
    is_random: bool = False

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Put back the parameter that a forward pass may write."""
        scale = self.subject.scale
        before = scale.detach().clone()
        try:
            yield
        finally:
            scale.data.copy_(before)


@dataclass
class Attacker:
    """An attack, and the model that it has."""

    attack: Attack
    victim: Victim


@dataclass
class Scene:
    """All of a sequence.

    Attributes:
        folder: for files that models read.
        victims: the models.
        attackers: the attacks; several may share a model.
        around: contexts of the caller's own, entered around each call.
        undone: what puts global state back in the end.
    """

    folder: Path
    victims: list[Victim] = field(default_factory=list)
    attackers: list[Attacker] = field(default_factory=list)
    around: list[Callable[[], AbstractContextManager[Any]]] = field(default_factory=list)
    undone: ExitStack = field(default_factory=ExitStack)

    def victim(self, rng: random.Random) -> Victim:
        """One of the models."""
        return rng.choice(self.victims)

    def add_victim(self, rng: random.Random) -> Victim:
        """A new model, with an attack on it."""
        subject = Subject(rng, products=rng.random() < 0.3)
        settle_statistics(subject)
        subject.train(rng.random() < 0.5)
        victim = Victim(subject, subject)
        self.victims.append(victim)
        self.add_attacker(rng, victim)
        return victim

    def add_attacker(self, rng: random.Random, victim: Victim) -> None:
        """A new attack on a model."""
        self.attackers.append(Attacker(random_attack(rng, victim.outer), victim))

    def replace_outer(self, rng: random.Random, victim: Victim, outer: Any) -> None:
        """Attack another object in the place of a model, by its attacks or by new ones."""
        victim.outer = outer
        for attacker in self.attackers:
            if attacker.victim is victim and rng.random() < 0.5:
                attacker.attack.model = outer
            elif attacker.victim is victim:
                attacker.attack = random_attack(rng, outer)


def random_attack(rng: random.Random, model: Callable[[Tensor], Tensor]) -> Attack:
    """An attack without random numbers of its own where it can do without."""
    engine = rng.choice(("auto", "auto", "fixed", "eager", "compiled"))
    precision = rng.choice(("auto", "auto", "auto", "fp32", "bf16"))
    kind = rng.choice(("PGD", "PGD", "PGD", "FGSM", "CW", "MIM", "APGD", "Square", "FAB"))
    norm = rng.choice(("linf", "linf", "l2", "l1")) if kind != "FGSM" else "linf"
    shared: dict[str, Any] = {"engine": engine, "precision": precision, "norm": norm}
    if not isinstance(model, nn.Module) and engine == "compiled":
        shared["engine"] = "auto"
    eps = EPS[norm]
    if kind in ("PGD", "CW", "MIM"):
        steps = rng.randint(1, 3)
        shared |= {"alpha": eps / steps, "steps": steps, "random_start": False}
    elif kind == "APGD":
        shared |= {"steps": 4, "loss": rng.choice(("ce", "cw"))}
    elif kind == "Square":
        shared |= {"queries": 12}
    elif kind == "FAB":
        shared |= {"steps": 3, "target_classes": rng.choice((None, 2))}
    return getattr(fastadv, kind)(model, eps=eps, **shared)
