"""Calls of attacks in a sequence, each compared with a loop that runs the live model alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from attack_helpers import assert_same_state, cross_entropy, margin, plain_pgd, state_of
from engine_fuzz import ENGINES
from sequence_scene import Attacker, Scene, Victim
from torch import Tensor, nn

import fastadv
from fastadv.attacks import Attack

# The smallest cosine of the perturbations with the live loop's, and share of its gain in the loss.
_LEAST = {"fp32": 0.97, "bf16": 0.6, "fp16": 0.6}
_GAIN = {"fp32": 0.97, "bf16": 0.5, "fp16": 0.5}
_SIDES = (6, 7, 9, 12)


def random_batch(rng: random.Random, victim: Victim) -> tuple[Tensor, Tensor]:
    """Images away from the bounds, and labels."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    size, sides = rng.choice((1, 2, 3, 4, 8, 17)), (rng.choice(_SIDES), rng.choice(_SIDES))
    x = 0.2 + 0.6 * torch.rand(size, 3, *sides, generator=generator, dtype=torch.float32)
    y = torch.randint(0, 5, (size,), generator=generator)
    if rng.random() < 0.2:
        x = x.contiguous(memory_format=torch.channels_last)
    return x.to(victim.dtype if victim.dtype == torch.float64 else torch.float32), y


def call(rng: random.Random, scene: Scene) -> None:
    """Attack a batch, and compare."""
    check(rng.choice(scene.attackers), scene, *random_batch_for(rng, scene))


def random_batch_for(rng: random.Random, scene: Scene) -> tuple[Tensor, Tensor]:
    """A batch that all models of a scene take."""
    return random_batch(rng, scene.victims[0])


def check(attacker: Attacker, scene: Scene, x: Tensor, y: Tensor) -> None:
    """One call of an attack on a batch.

    Raises:
        AssertionError: the result is another one than the live model's, or something has changed.
    """
    attack, victim = attacker.attack, attacker.victim
    if not isinstance(victim.outer, nn.Module):
        victim.subject.eval()
    x = x.to(torch.float64 if victim.dtype == torch.float64 else torch.float32)
    before, given = state_of(victim.subject), x.clone()
    with ExitStack() as around:
        for context in scene.around:
            around.enter_context(context())
        try:
            adv = attack(x, y, seed=1)
        except ValueError as error:  # "compiled" for a model that has no copy
            if "engine must be" not in str(error):
                raise
            ENGINES["refused in a sequence"] += 1
            assert_same_state(state_of(victim.subject), before)
            return
    assert_same_state(state_of(victim.subject), before)
    assert torch.equal(x, given), "the images have changed"
    assert not adv.requires_grad and adv.isfinite().all()
    ENGINES[f"sequence: {attack.last.engine} {attack.last.precision}"] += 1
    compare(attack, victim, x, y, adv)


def compare(attack: Attack, victim: Victim, x: Tensor, y: Tensor, adv: Tensor) -> None:
    """Compare a result with the loop on the live model."""
    precision = attack.last.precision if victim.dtype != torch.float16 else "fp16"
    with in_eval_mode(victim), victim.as_it_was():
        wanted = live_result(attack, victim, x, y)
        cosine = alike(adv - x, wanted - x)
        gains = [gain(victim, x, y, found) for found in (adv, wanted)]
        verdicts = [right(victim, found, y) for found in (adv, wanted)]
        least, share, small = _LEAST[precision], _GAIN[precision], 1e-4
        if victim.is_random:
            least = share = 0.3
        elif precision != "fp32" and isinstance(attack, fastadv.Square):
            least, share = -1.0, 0.3  # rounding lets it accept other squares
            small = 0.02
        told = (
            f"cosine with the live loop {cosine:.3f}, gains in the loss {gains[0]:.4g} and "
            f"{gains[1]:.4g}, by {describe(attack)}, which ran {attack.last.engine} "
            f"{attack.last.precision} ({attack.last.reason}), batch {tuple(x.shape)}"
        )
        if cosine >= least and (gains[0] >= share * gains[1] or gains[1] < small):
            assert victim.is_random or precision != "fp32" or verdicts_agree(*verdicts), (
                f"other images are robust; {told}"
            )
            return
        moved = x + 1e-5 * torch.randn_like(x)
        own = alike(live_result(attack, victim, moved, y) - moved, wanted - x)
        if own < least + 0.02 or (victim.is_random and cosine >= 0.3):
            ENGINES["sequence: the live loop itself is not steady"] += 1
            return
    raise AssertionError(told)


def verdicts_agree(mine: Tensor, theirs: Tensor) -> bool:
    """Whether margins [B] have the same signs, apart from those next to 0."""
    return bool(((mine > 0) == (theirs > 0))[theirs.abs() > 0.02].all())


def live_result(attack: Attack, victim: Victim, x: Tensor, y: Tensor) -> Tensor:
    """What a loop on the live model gives: one written by hand, or an attack on a plain callable."""
    settings, model = attack.settings, live(victim)
    by_hand = isinstance(attack, (fastadv.PGD, fastadv.CW)) and type(attack) is not fastadv.MIM
    if by_hand and settings.norm != "l1" and type(attack) in (fastadv.PGD, fastadv.CW):
        loss = margin if isinstance(attack, fastadv.CW) else cross_entropy
        numbers: Any = settings
        with torch.enable_grad():
            return plain_pgd(
                model, x, y, x, eps=settings.eps, alpha=numbers.alpha, steps=numbers.steps,
                loss=loss, norm=settings.norm,
            ).detach()  # fmt: skip
    other = type(attack)(model, **_arguments(attack))
    return other(x, y, seed=1)


def _arguments(attack: Attack) -> dict[str, Any]:
    names = ("eps", "norm", "steps", "alpha", "random_start", "loss", "queries", "target_classes")
    found = {n: getattr(attack.settings, n) for n in names if hasattr(attack.settings, n)}
    if isinstance(attack, (fastadv.CW, fastadv.FGSM)):
        found.pop("loss", None)
    if isinstance(attack, fastadv.FGSM):
        found = {"eps": attack.settings.eps, "norm": attack.settings.norm}
    return found | {"engine": "eager", "precision": "fp32"}


def live(victim: Victim) -> Callable[[Tensor], Tensor]:
    """The live model as a plain callable, which gets images of its own."""

    def run(z: Tensor) -> Tensor:
        return victim.outer(z.to(victim.dtype).clone()).clone().to(z.dtype)

    return run


@contextmanager
def in_eval_mode(victim: Victim) -> Iterator[None]:
    """Within, all parts of a module are in eval mode; the mode within another callable is the caller's."""
    if not isinstance(victim.outer, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in victim.subject.modules()]
    victim.subject.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def gain(victim: Victim, x: Tensor, y: Tensor, adv: Tensor) -> float:
    """By how much the mean cross-entropy has grown."""
    with torch.no_grad():
        before, after = (F.cross_entropy(live(victim)(z), y) for z in (x, adv))
    return float(after - before)


def right(victim: Victim, adv: Tensor, y: Tensor) -> Tensor:
    """Per image, by how much the label's logit is the largest, [B]."""
    with torch.no_grad():
        logits = live(victim)(adv)
    others = logits.scatter(1, y[:, None], -torch.inf).max(1).values
    return logits.gather(1, y[:, None])[:, 0] - others


def alike(one: Tensor, other: Tensor) -> float:
    """The cosine of two batches of perturbations; 1 where both vanish."""
    one, other = one.double().flatten(), other.double().flatten()
    lengths = one.norm() * other.norm()
    if float(lengths) == 0:
        return float(one.norm() == other.norm())
    return float(one @ other / lengths)


def describe(attack: Attack) -> str:
    """The attack and what it was told."""
    settings = attack.settings
    return f"{type(attack).__name__} {settings.norm} engine={settings.engine} precision={settings.precision}"
