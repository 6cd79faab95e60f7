"""Operations of a sequence on weights, buffers and their dtypes."""

from __future__ import annotations

import copy
import random
from contextlib import suppress

import torch
import torch.nn.functional as F
from sequence_calls import call, in_eval_mode, live, random_batch
from sequence_scene import Scene
from sequence_subject import CLASSES, Subject
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune


def _layer(rng: random.Random, subject: Subject) -> nn.Module | None:
    """A layer whose weight is a parameter, and no result of others."""
    kinds = (nn.Conv2d, nn.Linear)
    found = [m for m in subject.modules() if isinstance(m, kinds) and "weight" in m._parameters]
    return rng.choice(found) if found else None


def _other(tensor: Tensor) -> Tensor:
    """Values that are clearly other ones, of about the same size."""
    spread = float(tensor.detach().std(unbiased=False)) or 0.1
    return 0.5 * tensor.detach() + spread * torch.randn_like(tensor)


def optimizer_step(rng: random.Random, scene: Scene) -> None:
    victim = scene.victim(rng)
    subject = victim.subject
    parameters = [p for p in subject.parameters() if p.requires_grad]
    if not parameters or victim.dtype == torch.float16:
        return
    optimizer = rng.choice((torch.optim.SGD, torch.optim.Adam))(parameters, lr=0.05)
    subject.train()
    x = torch.rand(8, 3, 9, 9).to(victim.dtype)
    y = torch.randint(0, CLASSES, (8,))
    for _ in range(2):
        optimizer.zero_grad(set_to_none=rng.random() < 0.5)
        loss = F.cross_entropy(subject(x.clone()), y)
        if loss.requires_grad and bool(loss.isfinite()):
            loss.backward()
            optimizer.step()


def noise_in_place(rng: random.Random, scene: Scene) -> None:
    with torch.no_grad():
        for parameter in scene.victim(rng).subject.parameters():
            parameter.copy_(_other(parameter))


def load_state(rng: random.Random, scene: Scene) -> None:
    subject = scene.victim(rng).subject
    state = {
        n: _other(v) if v.is_floating_point() and "running_var" not in n else v
        for n, v in subject.state_dict().items()
    }
    subject.load_state_dict(state, assign=rng.random() < 0.5)


def data_replaced(rng: random.Random, scene: Scene) -> None:
    layer = _layer(rng, scene.victim(rng).subject)
    if layer is not None:
        layer.weight.data = _other(layer.weight)


def data_copied(rng: random.Random, scene: Scene) -> None:
    layer = _layer(rng, scene.victim(rng).subject)
    if layer is not None:
        layer.weight.data.copy_(_other(layer.weight))


def numpy_memory(rng: random.Random, scene: Scene) -> None:
    """Write past torch's counters."""
    layer = _layer(rng, scene.victim(rng).subject)
    if layer is not None:
        values = layer.weight.detach().numpy()
        values *= -1


def new_parameter(rng: random.Random, scene: Scene) -> None:
    layer = _layer(rng, scene.victim(rng).subject)
    if layer is not None:
        layer.weight = nn.Parameter(_other(layer.weight))


def averaged_swap(rng: random.Random, scene: Scene) -> None:
    """Swap the weights with averaged ones, as evaluations of an EMA do."""
    subject = scene.victim(rng).subject
    names = [n for n, p in subject.named_parameters() if not hasattr(p, "_is_swapped")]
    for name in names:
        parameter = subject.get_parameter(name)
        other = nn.Parameter(_other(parameter), requires_grad=parameter.requires_grad)
        try:
            torch.utils.swap_tensors(parameter, other)
        except RuntimeError:  # somebody holds a graph or a weak reference
            parameter.data, other.data = other.data, parameter.data


def vector(rng: random.Random, scene: Scene) -> None:
    parameters = list(scene.victim(rng).subject.parameters())
    if len({p.dtype for p in parameters}) == 1:
        flat = nn.utils.parameters_to_vector(parameters).detach()
        nn.utils.vector_to_parameters(_other(flat), parameters)


def normalised(rng: random.Random, scene: Scene) -> None:
    layer = _layer(rng, scene.victim(rng).subject)
    if layer is not None and layer.weight.dtype != torch.float16:
        rng.choice((parametrizations.weight_norm, parametrizations.spectral_norm))(layer)


def no_longer_normalised(rng: random.Random, scene: Scene) -> None:
    for module in list(scene.victim(rng).subject.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(
                module, "weight", leave_parametrized=rng.random() < 0.7
            )


def pruned(rng: random.Random, scene: Scene) -> None:
    layer = _layer(rng, scene.victim(rng).subject)
    if layer is not None:
        prune.random_unstructured(layer, "weight", 0.6)


def mask_changed(rng: random.Random, scene: Scene) -> None:
    for module in scene.victim(rng).subject.modules():
        if hasattr(module, "weight_mask"):
            module.weight_mask.copy_((torch.rand_like(module.weight_mask) < 0.5).float())


def no_longer_pruned(rng: random.Random, scene: Scene) -> None:
    for module in scene.victim(rng).subject.modules():
        if hasattr(module, "weight_orig") and hasattr(module, "weight_mask"):
            prune.remove(module, "weight")


def buffer_in_place(rng: random.Random, scene: Scene) -> None:
    with torch.no_grad():
        scene.victim(rng).subject.offset.mul_(-2)


def buffer_again(rng: random.Random, scene: Scene) -> None:
    subject = scene.victim(rng).subject
    if rng.random() < 0.5:
        subject.register_buffer("offset", _other(subject.offset))
    else:
        subject.offset = _other(subject.offset)


def buffer_data(rng: random.Random, scene: Scene) -> None:
    subject = scene.victim(rng).subject
    subject.offset.data = _other(subject.offset)


def buffer_becomes_attribute(rng: random.Random, scene: Scene) -> None:
    subject = scene.victim(rng).subject
    if "offset" in subject._buffers:
        offset = _other(subject.offset)
        del subject.offset
        subject.offset = nn.Parameter(offset) if rng.random() < 0.5 else offset


def statistics(rng: random.Random, scene: Scene) -> None:
    norm = scene.victim(rng).subject.norm
    if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
        norm.running_mean += torch.randn_like(norm.running_mean)
        norm.running_var *= 0.3 + 2 * torch.rand_like(norm.running_var)


def tied(rng: random.Random, scene: Scene) -> None:
    body = scene.victim(rng).subject.body
    if len(body) > 1 and all("weight" in layer._parameters for layer in body[:2]):
        body[1].weight = body[0].weight


def requires_grad(rng: random.Random, scene: Scene) -> None:
    for module in scene.victim(rng).subject.children():
        module.requires_grad_(rng.random() < 0.6)


def double(rng: random.Random, scene: Scene) -> None:
    victim = scene.victim(rng)
    victim.dtype = torch.float64 if victim.dtype == torch.float32 else torch.float32
    victim.subject.to(victim.dtype)
    victim.subject._memory = victim.subject._memory.to(victim.dtype)


def half_for_a_while(rng: random.Random, scene: Scene) -> None:
    """One call in float16, of which only a result is asked, and float32 again."""
    victim = scene.victim(rng)
    if victim.dtype != torch.float32 or any(
        map(parametrize.is_parametrized, victim.subject.modules())
    ):
        return
    victim.subject.half()
    memory, victim.subject._memory = victim.subject._memory, victim.subject._memory.half()
    attacker = next(a for a in scene.attackers if a.victim is victim)
    try:
        attacker.attack(*random_batch(rng, victim), seed=1)
    except (ValueError, TypeError, RuntimeError):
        pass
    finally:
        victim.subject.float()
        victim.subject._memory = memory


def memory_format(rng: random.Random, scene: Scene) -> None:
    formats = (torch.channels_last, torch.contiguous_format)
    scene.victim(rng).subject.to(memory_format=rng.choice(formats))


def nan_for_a_while(rng: random.Random, scene: Scene) -> None:
    victim = scene.victim(rng)
    layer = _layer(rng, victim.subject)
    if layer is None:
        return
    good = layer.weight.detach().clone()
    layer.weight.data.fill_(torch.nan)
    for attacker in scene.attackers:
        if attacker.victim is victim:
            with suppress(ValueError, RuntimeError):
                attacker.attack(*random_batch(rng, victim), seed=1)
    layer.weight.data.copy_(good)


def copied(rng: random.Random, scene: Scene) -> None:
    """Go on with a copy of an attack and its model, and attack the original once more."""
    attacker = rng.choice(scene.attackers)
    victim = attacker.victim
    if victim.outer is not victim.subject:
        return
    attack = copy.deepcopy(attacker.attack)
    noise_in_place(rng, scene)
    call(rng, scene)
    attacker.attack = attack
    victim.outer = victim.subject = attack.model
    for other in scene.attackers:
        if other.victim is victim and other is not attacker:
            other.attack.model = attack.model


def gradients_kept(rng: random.Random, scene: Scene) -> None:
    """Leave a graph and gradients of the caller's own behind."""
    victim = scene.victim(rng)
    with in_eval_mode(victim):
        logits = live(victim)(random_batch(rng, victim)[0].requires_grad_())
    if logits.requires_grad:
        logits.sum().backward(retain_graph=True)


OPERATIONS = (
    optimizer_step, noise_in_place, load_state, data_replaced, data_copied, numpy_memory, new_parameter,
    averaged_swap, vector, normalised, no_longer_normalised, pruned, mask_changed, no_longer_pruned,
    buffer_in_place, buffer_again, buffer_data, buffer_becomes_attribute, statistics, tied, requires_grad, double,
    half_for_a_while, memory_format, nan_for_a_while, copied, gradients_kept,
)  # fmt: skip
