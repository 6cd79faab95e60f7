"""Operations of a sequence on a model's code: what it reads, its parts, hooks, methods and wrappers."""

from __future__ import annotations

import os
import pickle
import random
import types
from typing import Any

import torch
from sequence_scene import Scene
from sequence_subject import OUTSIDE, VARIABLE, Subject, Transform
from torch import Tensor, nn


def sharpness(rng: random.Random, scene: Scene) -> None:
    scene.victim(rng).subject.sharpness = rng.choice((-1.5, 1.0, 3.0))


def flag(rng: random.Random, scene: Scene) -> None:
    flags = scene.victim(rng).subject.flags
    flags["mirror"] = not flags["mirror"]


def new_flags(rng: random.Random, scene: Scene) -> None:
    scene.victim(rng).subject.flags = {"mirror": rng.random() < 0.5}


def order(rng: random.Random, scene: Scene) -> None:
    rng.shuffle(scene.victim(rng).subject.order)


def gains(rng: random.Random, scene: Scene) -> None:
    """Write into numpy's memory."""
    scene.victim(rng).subject.gains[rng.randrange(3)] *= -1


def new_gains(rng: random.Random, scene: Scene) -> None:
    subject = scene.victim(rng).subject
    subject.gains = subject.gains[::-1].copy()


def closure(rng: random.Random, scene: Scene) -> None:
    """A new function, or another value in the closure of the old one."""
    subject = scene.victim(rng).subject
    if subject.transform is None or rng.random() < 0.5:
        subject.transform = Transform(rng.choice((0, 1, 2))).made()
    else:
        cells = subject.transform.__closure__
        assert cells is not None
        cells[0].cell_contents[0] = rng.choice((0, 1, 2))


def global_variable(rng: random.Random, scene: Scene) -> None:
    OUTSIDE["rolled"] = not OUTSIDE["rolled"]
    scene.undone.callback(OUTSIDE.update, rolled=False)


def environment(rng: random.Random, scene: Scene) -> None:
    if os.environ.pop(VARIABLE, None) is None:
        os.environ[VARIABLE] = "1"
    scene.undone.callback(os.environ.pop, VARIABLE, None)


def file(rng: random.Random, scene: Scene) -> None:
    subject = scene.victim(rng).subject
    subject.file = scene.folder / "how"
    subject.file.write_text(rng.choice(("transposed", "as it is")))


def looks(rng: random.Random, scene: Scene) -> None:
    subject = scene.victim(rng).subject
    subject.looks = not subject.looks


def counts(rng: random.Random, scene: Scene) -> None:
    """Let a model count its calls, which makes its proof longer."""
    subject = scene.victim(rng).subject
    subject.calls = 0 if subject.calls is None else None


def edits(rng: random.Random, scene: Scene) -> None:
    subject = scene.victim(rng).subject
    subject.edits = not subject.edits


def reuses(rng: random.Random, scene: Scene) -> None:
    subject = scene.victim(rng).subject
    subject.reuses = not subject.reuses


def adapts(rng: random.Random, scene: Scene) -> None:
    subject = scene.victim(rng).subject
    subject.adapts = not subject.adapts


def writes(rng: random.Random, scene: Scene) -> None:
    subject = scene.victim(rng).subject
    subject.writes = not subject.writes


def purifies(rng: random.Random, scene: Scene) -> None:
    victim = scene.victim(rng)
    subject = victim.subject
    if victim.dtype == torch.float32 and not subject.edits:
        subject.purifies = not subject.purifies


def noise(rng: random.Random, scene: Scene) -> None:
    victim = scene.victim(rng)
    victim.subject.noise = 0.0 if victim.subject.noise else 0.003
    victim.is_random = bool(victim.subject.noise)


def _negated(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * -0.7


def _reversed(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out.flip(1)


def _mirrored(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0].flip(-1),)


def _turned(module: nn.Module, received: Any, given: Any) -> Any:
    return tuple(None if g is None else g.flip(-1) for g in received)


def hook(rng: random.Random, scene: Scene) -> None:
    victim = scene.victim(rng)
    subject = victim.subject
    outer = victim.outer if isinstance(victim.outer, nn.Module) else subject
    module = rng.choice((outer, subject, subject.stem, subject.head, subject.norm))
    module.register_forward_hook(rng.choice((_negated, _reversed)), prepend=rng.random() < 0.5)


def pre_hook(rng: random.Random, scene: Scene) -> None:
    subject = scene.victim(rng).subject
    rng.choice((subject, subject.stem, subject.head)).register_forward_pre_hook(_mirrored)


def backward_hook(rng: random.Random, scene: Scene) -> None:
    scene.victim(rng).subject.head.register_full_backward_hook(_turned)


def hook_for_all_modules(rng: random.Random, scene: Scene) -> None:
    kinds = rng.choice((nn.Linear, nn.DataParallel, nn.Sequential, Subject))

    def turned(module: nn.Module, args: Any, out: Any) -> Any:
        return out.flip(1) if isinstance(module, kinds) else None

    scene.undone.callback(nn.modules.module.register_module_forward_hook(turned).remove)


def no_hooks(rng: random.Random, scene: Scene) -> None:
    for module in scene.victim(rng).subject.modules():
        if not hasattr(module, "weight_mask"):  # pruning is such a hook
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
            module._backward_hooks.clear()


def forward_of_instance(rng: random.Random, scene: Scene) -> None:
    victim = scene.victim(rng)
    outer: Any = victim.outer if isinstance(victim.outer, nn.Module) else victim.subject
    if "forward" in vars(outer):
        del outer.forward
    else:
        outer.forward = types.MethodType(_flipped_forward, outer)


def _flipped_forward(self: Any, x: Tensor) -> Tensor:
    return 0.8 * type(self).forward(self, x.flip(2))


def forward_of_class(rng: random.Random, scene: Scene) -> None:
    plain = Subject._features
    scene.undone.callback(setattr, Subject, "_features", plain)

    def features(self: Subject, x: Tensor) -> Tensor:
        return plain(self, x.flip(2))

    Subject._features = features  # type: ignore[method-assign]


def activation(rng: random.Random, scene: Scene) -> None:
    scene.victim(rng).subject.act = rng.choice((nn.Tanh, nn.ReLU, nn.SiLU, nn.Softplus))()


def layer_replaced(rng: random.Random, scene: Scene) -> None:
    subject = scene.victim(rng).subject
    dtype = next(subject.parameters()).dtype
    if isinstance(subject.stem, nn.Conv2d):
        old = subject.stem
        with torch.random.fork_rng(devices=[]):
            subject.stem = nn.Conv2d(3, old.out_channels, 3, old.stride, old.padding).to(dtype)
    subject.drop = nn.Dropout(rng.choice((0.0, 0.5)))


def part_deleted_or_added(rng: random.Random, scene: Scene) -> None:
    body = scene.victim(rng).subject.body
    if len(body) > 2 or (len(body) == 2 and rng.random() < 0.5):
        del body[rng.randrange(1, len(body))]
    elif isinstance(body[0], nn.Conv2d):
        width = body[0].in_channels
        body.append(nn.Conv2d(width, width, 3, padding=1).to(next(body.parameters()).dtype))


def batch_norm(rng: random.Random, scene: Scene) -> None:
    norm = scene.victim(rng).subject.norm
    if not isinstance(norm, nn.BatchNorm2d):
        return
    way = rng.choice(("eps", "momentum", "affine", "batch statistics", "removed"))
    if way == "eps":
        norm.eps = rng.choice((1e-5, 0.5))
    elif way == "momentum":
        norm.momentum = rng.choice((0.1, None))
    elif way == "affine" and norm.weight is not None:
        norm.weight = norm.bias = None
    elif way == "batch statistics":
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = None
    elif way == "removed":
        scene.victim(rng).subject.norm = nn.Identity()


def modes(rng: random.Random, scene: Scene) -> None:
    subject = scene.victim(rng).subject
    rng.choice((subject, subject.norm, subject.drop)).train(rng.random() < 0.5)


def dropout(rng: random.Random, scene: Scene) -> None:
    scene.victim(rng).subject.drop.p = rng.choice((0.0, 0.3, 0.9))


def wrapped(rng: random.Random, scene: Scene) -> None:
    """Attack a wrapper of the network, or the network itself again."""
    victim = scene.victim(rng)
    subject, way = victim.subject, rng.choice(("itself", "parallel", "sequential", "functional"))
    outer: Any = subject
    if way == "parallel":
        outer = nn.DataParallel(victim.outer if isinstance(victim.outer, nn.Module) else subject)
    elif way == "sequential":
        outer = nn.Sequential(subject, nn.Identity())
    elif way == "functional":
        outer = _Functional(subject)
    scene.replace_outer(rng, victim, outer)


class _Functional:
    """A network with other weights, which `torch.func` hands in."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    def __call__(self, x: Tensor) -> Tensor:
        weights = {n: 0.9 * p for n, p in self.subject.named_parameters()}
        return torch.func.functional_call(self.subject, weights, (x,))


def shared_attack(rng: random.Random, scene: Scene) -> None:
    """Let an attack go on to another model."""
    attacker, victim = rng.choice(scene.attackers), scene.victim(rng)
    attacker.attack.model, attacker.victim = victim.outer, victim
    if attacker.attack.engine == "compiled" and not isinstance(victim.outer, nn.Module):
        attacker.attack.engine = "auto"


def another_attack(rng: random.Random, scene: Scene) -> None:
    scene.add_attacker(rng, scene.victim(rng))


def another_model(rng: random.Random, scene: Scene) -> None:
    if len(scene.victims) < 3 and all(v.dtype == torch.float32 for v in scene.victims):
        scene.add_victim(rng)


def another_setting(rng: random.Random, scene: Scene) -> None:
    attack = rng.choice(scene.attackers).attack
    if attack.engine != "compiled":
        attack.engine = rng.choice(("auto", "fixed", "eager"))
        attack.precision = rng.choice(("auto", "fp32"))


def pickled(rng: random.Random, scene: Scene) -> None:
    """Go on with an attack and a model out of a pickle, if they have no closures."""
    attacker = rng.choice(scene.attackers)
    victim = attacker.victim
    if victim.outer is not victim.subject:
        return
    try:
        attack = pickle.loads(pickle.dumps(attacker.attack))
    except (AttributeError, pickle.PicklingError, RuntimeError):
        return
    victim.outer = victim.subject = attack.model
    for other in scene.attackers:
        if other.victim is victim:
            other.attack.model = attack.model
    attacker.attack = attack


def engines_shared(rng: random.Random, scene: Scene) -> None:
    one, other = rng.choice(scene.attackers), rng.choice(scene.attackers)
    if one is not other and one.attack.model is other.attack.model:
        one.attack.share_engines(other.attack)


OPERATIONS = (
    sharpness, flag, new_flags, order, gains, new_gains, closure, global_variable, environment, file, looks,
    counts, edits, reuses, adapts, adapts, writes, purifies, noise, hook, pre_hook, backward_hook,
    hook_for_all_modules, no_hooks, forward_of_instance, forward_of_class, activation, layer_replaced,
    part_deleted_or_added, batch_norm, modes, dropout, wrapped, shared_attack, another_attack, another_model,
    another_setting, pickled, engines_shared,
)  # fmt: skip
