"""The optimiser of one model, its gradient clipping, and averages of weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from fastadv.trainers.recipe import Recipe

_NORMS = (
    nn.modules.batchnorm._NormBase,  # BatchNorm, SyncBatchNorm and InstanceNorm
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
# Devices for which torch has fused optimisers: one kernel over all parameters.
_FUSED_DEVICES = ("cpu", "cuda")


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Build the recipe's optimiser over the parameters of a model that require gradients.

    Without `norm_decay` the weights and biases of normalisation layers are a separate parameter group with weight
    decay 0.

    Raises:
        ValueError: if no parameter requires a gradient.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay_of = decays(model, recipe)
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no parameters that require gradients")
    fusable = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters)
    groups = [
        {"params": [p for p in parameters if decay_of(p) == decay], "weight_decay": decay}
        for decay in dict.fromkeys(map(decay_of, parameters))
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=recipe.lr,
            betas=recipe.betas,
            fused=fusable,
        )
    return torch.optim.SGD(
        groups,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        fused=fusable,
    )


def decays(model: nn.Module, recipe: Recipe) -> Callable[[Tensor], float]:
    """Return a function that gives the weight decay of each parameter of a model."""
    norms = [m for m in model.modules() if isinstance(m, _NORMS) and not recipe.norm_decay]
    without_decay = {id(p) for norm in norms for p in norm.parameters(recurse=False)}
    return lambda parameter: 0.0 if id(parameter) in without_decay else recipe.weight_decay


def set_place(optimizer: torch.optim.Optimizer, recipe: Recipe, epoch: float) -> None:
    """Set an optimiser's learning rate and momentum for a position in the run, in epochs counted from 0."""
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr_at(epoch)
        if recipe.optimizer == "adamw":
            cycled = recipe.schedule.momentum(epoch, recipe.epochs)
            group["betas"] = (recipe.betas[0] if cycled is None else cycled, recipe.betas[1])
        else:
            group["momentum"] = recipe.momentum_at(epoch)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a saved state. Each momentum gets the memory layout of its parameter.

    The fused kernel reads both in memory order, so that different layouts would give wrong results. torch would
    take all numbers of the groups from the state. Those that `set_place` does not set stay as they are.

    Raises:
        ValueError: if it is the state of another optimiser, or of other groups of parameters.
    """
    groups = optimizer.param_groups
    if any(("betas" in group) != ("betas" in groups[0]) for group in state["param_groups"]):
        raise ValueError("it is the state of another optimizer")
    names = [name for name in ("weight_decay", "nesterov") if name in groups[0]]
    own = [{str(name): group[name] for name in names} for group in groups]
    optimizer.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)
        for parameter in group["params"]:
            entry = optimizer.state[parameter]
            for name, value in entry.items():
                is_like = isinstance(value, Tensor) and value.shape == parameter.shape
                if is_like and value.stride() != parameter.stride():
                    entry[name] = torch.empty_like(parameter).copy_(value).detach()


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Return the L2 norm of all gradients together, a scalar tensor on their device; 0 where there is none."""
    gradients = _gradients(optimizer)
    if not gradients:  # torch's function would make the 0 on the CPU
        parameter: Tensor = optimizer.param_groups[0]["params"][0]
        return torch.zeros((), dtype=torch.float32, device=parameter.device)
    return nn.utils.get_total_norm(gradients)


def clip_gradients(optimizer: torch.optim.Optimizer, norm: Tensor, largest: float) -> None:
    """Scale the gradients down so that their norm is at most ``largest``; ``norm`` is their norm before."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grads_with_norm_(parameters, largest, norm)


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]


class Average:
    """An average of a model's changing tensors: weights that require gradients, and buffers that change.

    Args:
        model: the model, its modules in the modes in which it is trained. The buffers of modules in evaluation
            mode do not change.
        every_buffer: average the buffers of modules in evaluation mode as well.

    Attributes:
        model: a copy of the model that holds the average, in evaluation mode.
    """

    name: ClassVar[str]

    def __init__(self, model: nn.Module, every_buffer: bool) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        parameters = model.named_parameters(remove_duplicate=False)
        still = {name for name, parameter in parameters if not parameter.requires_grad}
        for path, module in model.named_modules(remove_duplicate=False):
            if not (module.training or every_buffer):
                still |= {name for name, _ in module.named_buffers(path, recurse=False)}
        # A tensor whose name the model's own hooks have changed counts as changing.
        self._moving = set(model.state_dict()) - still

    def state(self) -> dict[str, Tensor]:
        """Return the averaged tensors, by their names in the state dict."""
        return {k: v for k, v in self.model.state_dict().items() if k in self._moving}

    @torch.no_grad()
    def _move_towards(self, model: nn.Module, weight: float) -> None:
        """Replace each average by (1 - weight) average + weight value, with the model's value; copy integers."""
        averages, values = [], []
        live = model.state_dict()
        for name, value in self.state().items():
            if value.is_floating_point():
                averages.append(value)
                values.append(live[name])
            else:
                value.copy_(live[name])
        torch._foreach_lerp_(averages, values, weight)


class WeightAverage(Average):
    """Exponential moving average of a model's state; integers are copied.

    The decay grows from 0.1 to its value over the first steps, as min(decay, (1 + t) / (10 + t)),
    so that the random initial weights soon have little influence.

    Args:
        model: the model, as for `Average`.
        decay: weight of the old average at each step.
    """

    name = "ema"

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, every_buffer=False)
        self.decay = decay

    def update(self, model: nn.Module, step: int) -> None:
        """Add the model's weights after a step to the average; steps are counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        self._move_towards(model, 1 - decay)


class EpochAverage(Average):
    """Plain average of a model's weights at the ends of epochs (SWA).

    Source: Izmailov et al. 2018, algorithm 1.

    Args:
        model: the model.
    """

    name = "swa"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(
            model, every_buffer=True
        )  # `estimate_statistics` computes all buffers again

    def update(self, model: nn.Module, count: int) -> None:
        """Add the model's weights to the average as number ``count``; number 1 replaces the average."""
        self._move_towards(model, 1 / count)

    def estimate_statistics(self, batches: Iterable[tuple[Any, ...]]) -> None:
        """Compute BatchNorm's running statistics again, as plain means over batches (x, ...).

        The mean of the models' statistics differs from the statistics of the averaged weights. Dropout is active,
        as in training.
        """
        update_bn(batches, self.model)


def build_average(model: nn.Module, recipe: Recipe) -> WeightAverage | EpochAverage | None:
    """Build the average of a model's weights that the recipe asks for."""
    if recipe.swa_start is not None:
        return EpochAverage(model)
    return None if recipe.ema_decay is None else WeightAverage(model, recipe.ema_decay)


class BufferGuard:
    """Keeps a copy of the buffers of some models, which is restored when a step fails.

    A forward pass with values that are not finite leaves NaN in BatchNorm's running statistics.

    Args:
        models: the models.
    """

    def __init__(self, models: list[nn.Module]) -> None:
        self._buffers = [buffer for model in models for buffer in model.buffers()]
        self._copies = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def save(self) -> None:
        """Copy the buffers as they are now."""
        if self._buffers:
            torch._foreach_copy_(self._copies, self._buffers)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the values of the buffers at the last `save`."""
        if self._buffers:
            # `data` leaves the version counters unchanged, so that a graph made before can still be
            # differentiated.
            torch._foreach_copy_([buffer.data for buffer in self._buffers], self._copies)
