"""Random changes of a model between two uses of one attack."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from network_layers import Function, Residual
from torch import Tensor, nn
from torch.nn.utils import prune

Change = Callable[[random.Random, nn.Sequential], Any]


def _pick(rng: random.Random, model: nn.Module, *kinds: type) -> Any:
    found = [m for m in model.modules() if isinstance(m, kinds)]
    return rng.choice(found) if found else None


def _plain_layer(rng: random.Random, model: nn.Module) -> Any:
    """A layer whose weight is a parameter, and no result of others."""
    kinds = (nn.Conv2d, nn.Linear)
    found = [m for m in model.modules() if isinstance(m, kinds) and "weight" in m._parameters]
    return rng.choice(found) if found else None


def _train_a_step(rng: random.Random, model: nn.Sequential) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * parameter.std(unbiased=False) * torch.randn_like(parameter))


def _new_weight(rng: random.Random, model: nn.Sequential) -> None:
    layer = _plain_layer(rng, model)
    if layer is None:
        return
    layer.weight = nn.Parameter(torch.randn_like(layer.weight) * layer.weight.std(unbiased=False))


def _weight_data(rng: random.Random, model: nn.Sequential) -> None:
    layer = _plain_layer(rng, model)
    if layer is None:
        return
    layer.weight.data = layer.weight.data.flip(0) * 1.3


def _statistics(rng: random.Random, model: nn.Sequential) -> None:
    layer = _pick(rng, model, nn.BatchNorm2d)
    if layer is not None and layer.running_mean is not None:
        layer.running_mean += torch.randn_like(layer.running_mean)
        layer.running_var *= rng.choice((0.3, 3.0))


def _buffers(rng: random.Random, model: nn.Sequential) -> None:
    for module in model.modules():
        for buffer in module._buffers.values():
            if buffer is not None and buffer.is_floating_point():
                buffer.mul_(1.5)


def _number(rng: random.Random, model: nn.Sequential) -> None:
    """An eps, a slope, a scale: plain attributes that a forward pass reads."""
    for module in model.modules():
        for name in ("eps", "negative_slope", "scale"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, rng.choice((0.05, 0.5)))


def _skip(rng: random.Random, model: nn.Sequential) -> None:
    branch = _pick(rng, model, Residual)
    if branch is not None:
        branch.skipped = not branch.skipped


def _replace_activation(rng: random.Random, model: nn.Sequential) -> None:
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, (nn.ReLU, nn.LeakyReLU, nn.GELU, nn.Tanh)):
                setattr(parent, name, rng.choice((nn.Tanh, nn.SiLU, nn.ReLU))())


def _insert(rng: random.Random, model: nn.Sequential) -> None:
    layer = Function("inserted", lambda x: (x - 0.2).abs())
    model.insert(rng.randrange(len(model)), layer)


def _replace_layer(rng: random.Random, model: nn.Sequential) -> None:
    old = model[-1]
    if isinstance(old, nn.Linear):
        model[-1] = nn.Linear(old.in_features, old.out_features + rng.choice((0, 1)))


def _hook(rng: random.Random, model: nn.Sequential) -> None:
    factor = rng.choice((-1.0, 0.5))
    layer = rng.choice(list(model))
    layer.register_forward_hook(lambda module, args, out: out * factor)


def _pre_hook(rng: random.Random, model: nn.Sequential) -> None:
    model.register_forward_pre_hook(lambda module, args: (args[0].flip(3) * 0.9,))


def _forward(rng: random.Random, model: nn.Sequential) -> None:
    """Replace a module's forward method on the instance."""
    layer = rng.choice(list(model))
    plain = layer.forward

    def forward(x: Tensor) -> Tensor:
        return plain(x) * 0.5 + 0.1

    layer.forward = forward


def _share(rng: random.Random, model: nn.Sequential) -> None:
    """Tie the weights of two layers of one shape."""
    kinds = nn.Conv2d
    layers = [m for m in model.modules() if isinstance(m, kinds) and "weight" in m._parameters]
    for one in layers:
        for other in layers:
            if one is not other and one.weight.shape == other.weight.shape:
                other.weight = one.weight
                return


def _train_mode(rng: random.Random, model: nn.Sequential) -> None:
    model.train(not model.training)


def _freeze(rng: random.Random, model: nn.Sequential) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(rng.random() < 0.5)


def _untracked(rng: random.Random, model: nn.Sequential) -> None:
    """Let a BatchNorm layer use the statistics of the batch in eval mode as well."""
    layer = _pick(rng, model, nn.BatchNorm2d)
    if layer is not None and rng.random() < 0.5:
        layer.track_running_stats = False
        layer.running_mean = layer.running_var = None


def _prune(rng: random.Random, model: nn.Sequential) -> None:
    layer = _plain_layer(rng, model)
    if layer is not None:
        prune.random_unstructured(layer, "weight", 0.4)


def _end_of_pruning(rng: random.Random, model: nn.Sequential) -> None:
    for layer in model.modules():
        if hasattr(layer, "weight_orig"):
            prune.remove(layer, "weight")


def _normalise_weights(rng: random.Random, model: nn.Sequential) -> None:
    layer = _plain_layer(rng, model)
    if layer is not None:
        nn.utils.parametrizations.weight_norm(layer)


def _load(rng: random.Random, model: nn.Sequential) -> None:
    """Load a state, into the tensors that are there or in their place."""
    state = {n: v * 0.9 if v.is_floating_point() else v for n, v in model.state_dict().items()}
    model.load_state_dict(state, assign=rng.random() < 0.5)


def _no_hooks(rng: random.Random, model: nn.Sequential) -> None:
    for module in model.modules():
        if not hasattr(module, "weight_orig"):  # pruning is such a hook
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()


def _one_layers_mode(rng: random.Random, model: nn.Sequential) -> None:
    layer = rng.choice(list(model))
    layer.train(not layer.training)


def _nothing(rng: random.Random, model: nn.Sequential) -> None:
    pass


CHANGES: tuple[Change, ...] = (
    _train_a_step,
    _new_weight,
    _weight_data,
    _statistics,
    _buffers,
    _number,
    _skip,
    _replace_activation,
    _insert,
    _replace_layer,
    _hook,
    _pre_hook,
    _forward,
    _share,
    _train_mode,
    _freeze,
    _untracked,
    _prune,
    _end_of_pruning,
    _normalise_weights,
    _load,
    _no_hooks,
    _one_layers_mode,
    _nothing,
)


def change(rng: random.Random, model: nn.Sequential) -> str:
    """Change a model in one way or two; the names of the ways."""
    chosen = rng.sample(CHANGES, rng.choice((1, 1, 2)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.randrange(2**31))
        for one in chosen:
            with torch.no_grad():
                one(rng, model)
    return " and ".join(one.__name__.strip("_") for one in chosen)
