"""The methods that `methods.py` compares, and the numbers for small networks and few images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastadv.trainers import AdversarialRecipe, MultiStep, Recipe, find_method


def drops(epochs: int, *parts: float) -> MultiStep:
    """A tenth of the learning rate after each of these parts of a run."""
    return MultiStep(tuple(sorted({round(part * epochs) for part in parts})), 0.1)


@dataclass(frozen=True)
class Ground:
    """The network and the images of the comparison.

    Attributes:
        data: name of the data set.
        eps: radius of training and evaluation.
        epochs: number of epochs of the methods that train from scratch.
        changes: fields of every recipe.
        shorter: fields of the recipes of methods that have a length of their own.
    """

    data: str
    eps: float
    epochs: int
    changes: dict[str, Any]
    shorter: dict[str, dict[str, Any]] = field(default_factory=dict)


GROUNDS = {
    # eps as in the demo: a quarter of the smallest distance between training digits of different classes. A crop
    # by 4 pixels would be half of the image, and a mirrored digit is no digit.
    "digits": Ground("digits", 0.1, 20, {"batch_size": 64, "pad": 1, "flip": False}),
    "cifar10": Ground(
        "cifar10",
        8 / 255,
        5,
        {"batch_size": 64, "train_images": 5000},
        {
            "arrest": {"epochs": 5, "schedule": MultiStep((3,), 0.2), "replay_epochs": 2},
            "afs": {"epochs": 2, "schedule": MultiStep((1,), 0.1)},
        },
    ),
}


@dataclass(frozen=True)
class Entry:
    """One row of the comparison.

    Attributes:
        label: its name in the table; a leading dot hides it, as networks that only others build on.
        method: name of the method.
        changes: fields in which the recipe differs from the method's own and from the changes of the ground; or a
            function of the ground.
        teachers: labels of the entries whose networks it takes, in the method's order.
        model: name of the architecture of this entry and its teachers.
        radius: radius of the attack, in units of the ground's eps.
        step: step size of the attack, in units of `radius`.
    """

    label: str
    method: str
    changes: dict[str, Any] | Callable[[Ground], dict[str, Any]] = field(default_factory=dict)
    teachers: tuple[str, ...] = ()
    model: str = "small_cnn"
    radius: float = 1.0
    step: float = 0.25

    def recipe(self, ground: Ground, seed: int) -> Recipe:
        """The method's recipe on a ground."""
        kind = find_method(self.method).recipe_class
        own = self.changes(ground) if callable(self.changes) else self.changes
        changes = ground.changes | {"seed": seed, "monitor_every": 1000}
        if issubclass(kind, AdversarialRecipe):
            eps = self.radius * ground.eps
            changes |= {"eps": eps, "alpha": self.step * eps}
        if self.method not in _OWN_LENGTH:
            changes |= {"epochs": ground.epochs, "pad_mode": "constant"}
        if not {self.method, own.get("base")} & (_OWN_LENGTH | _ONE_CYCLE):
            changes |= {"schedule": drops(ground.epochs, 0.75, 0.9)}
        # Not by `replace`, so that VFD-Adv and BGAT begin with the numbers of their bases.
        return kind(**(changes | ground.shorter.get(self.method, {}) | own))


_OWN_LENGTH = {"arrest", "afs", "free"}  # these fine-tune, or count epochs in another way
_ONE_CYCLE = {"fast", "hat", "n_fgsm", "grad_align", "zero_grad", "dm_at"}
_ARREST_PARTS: dict[str, dict[str, Any]] = {
    "AFT": {"distill": False, "replay": False},
    "AFT + RGKD": {"replay": False},
    "AFT + NR": {"distill": False},
    "ARREST": {},
}


def _free(ground: Ground) -> dict[str, Any]:
    epochs = max(ground.epochs // 4, 1)
    return {"epochs": epochs, "steps": 4, "schedule": drops(epochs, 0.6, 0.9)}


def _fat(ground: Ground) -> dict[str, Any]:
    return {"tau_epochs": (round(0.4 * ground.epochs), round(0.75 * ground.epochs))}


def _sat(ground: Ground) -> dict[str, Any]:
    start = round(0.3 * ground.epochs)
    return {"gap_start": start, "gap_end": max(round(0.7 * ground.epochs), start + 1)}


def _las_at(ground: Ground) -> dict[str, Any]:
    center = round(255 * ground.eps)
    radii = tuple(max(round(part * center), 1) for part in (0.5, 0.75, 1.0, 1.25, 1.5))
    sizes = tuple(max(round(part * center), 1) for part in (0.125, 0.25, 0.5))
    choices = {"eps_choices": radii, "alpha_choices": sizes}
    return {"strategy": "small_cnn", "strategy_every": 5, **choices}


ENTRIES: tuple[Entry, ...] = (
    Entry("standard", "standard"),
    Entry("PGD-AT", "pgd_at"),
    Entry("PGD-AT + AWP", "pgd_at", {"awp_gamma": 0.01}),
    *(Entry(label, "arrest", parts, ("standard",)) for label, parts in _ARREST_PARTS.items()),
    Entry("TRADES", "trades"),
    Entry("MART", "mart"),
    Entry("ALP", "alp"),
    Entry("HAT", "hat", {}, ("standard",)),
    *(
        Entry(f"VFD-{base.upper()}", "vfd", {"base": base}, ("standard",))
        for base in ("trades", "mart", "alp", "hat")
    ),
    Entry("ACT", "act"),
    Entry("LBGAT", "lbgat"),
    Entry("BGAT", "lbgat", {"fixed": True}, ("standard",)),
    Entry("KD-AT", "kd_at", {}, ("standard", "PGD-AT")),
    Entry(".3/8 of eps", "pgd_at", radius=3 / 8),
    Entry(".5.5/8 of eps", "pgd_at", radius=5.5 / 8),
    Entry(
        "AFS (3 extractors)",
        "afs",
        teachers=(".3/8 of eps", ".5.5/8 of eps", "PGD-AT"),
        model="stack:3*small_cnn",
    ),
    Entry("Fast (FGSM-RS)", "fast", step=1.25),
    Entry("Free-4", "free", _free, step=1.0),
    Entry("FAT", "fat", _fat),
    Entry("TLA", "tla"),
    Entry("S2O", "s2o"),
    Entry("SAT", "sat", _sat),
    # Without further images, so that only their recipes remain.
    Entry("RST", "rst", {"extra_fraction": 0.0}),
    Entry("DM-AT", "dm_at", {"extra_fraction": 0.0}),
    Entry("N-FGSM", "n_fgsm", step=1.0),
    Entry("GradAlign", "grad_align", step=1.25),
    Entry("ZeroGrad", "zero_grad", step=2.0),
    Entry("LAS-AT", "las_at", _las_at),
)
