"""AWP: training at adversarially perturbed weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastadv.ranks import Ranks
from fastadv.trainers.method import LossResult, Update
from fastadv.trainers.optim import BufferGuard


class WeightPerturbation:
    """Adversarial weight perturbation: loss, gradient and step at w + gamma |w| g / |g|, which is then taken back.

    w is a weight tensor of more than one dimension, g the gradient of the training loss on the batch, norms are
    those of the whole tensor. Biases and BatchNorm's weights stay. Weight decay acts on the perturbed weights.

    Source: Wu et al. 2020, algorithm 1 with one step; as in the authors' code (csdongxian/AWP), whose copy of the
    model, from which g is taken, is not needed.

    Args:
        models: the models that are trained; the first one's weights are perturbed.
        gamma: size of the perturbation relative to the weights.
        ranks: the processes that train together, which perturb alike.

    Raises:
        ValueError: if the first model has no such weights that are trained.
    """

    def __init__(self, models: Sequence[nn.Module], gamma: float, ranks: Ranks) -> None:
        self._ranks = ranks
        self.gamma = gamma
        self._weights: list[Tensor] = [
            p for p in models[0].parameters() if p.requires_grad and p.dim() > 1
        ]
        if not self._weights:
            raise ValueError(
                f"awp_gamma must be 0 for {type(models[0]).__name__}, of whose weights that are trained "
                "no parameter has more than one dimension"
            )
        self._guard = BufferGuard(list(models))

    def moves(self, loss: Callable[[], LossResult]) -> list[Tensor]:
        """Compute the perturbation of each weight tensor; weights, their `.grad` and buffers stay as they are.

        Args:
            loss: runs the models and returns the training loss.

        Returns:
            gamma |w| g / |g|; 0 for a tensor whose g is 0 or not finite.
        """
        self._guard.save()
        try:
            found = torch.autograd.grad(
                loss().loss, self._weights, allow_unused=True, materialize_grads=True
            )
        finally:
            self._guard.restore()
        gradients = self._ranks.sum_all(found)  # of whose mean only the direction counts
        with torch.no_grad():
            sizes = torch.stack(torch._foreach_norm(self._weights))
            slopes = torch.stack(torch._foreach_norm(gradients))
            scales = self.gamma * sizes / slopes
            usable = torch.isfinite(slopes) & torch.isfinite(scales)
            return [
                torch.where(use, gradient * scale, 0.0)
                for gradient, scale, use in zip(gradients, scales, usable, strict=True)
            ]

    def step(self, moves: list[Tensor], loss: Callable[[], LossResult], update: Update) -> bool:
        """Take a step at the perturbed weights, and take the perturbation back.

        After a step the perturbation is subtracted, so that weights which the step leaves alone come back up to
        the rounding of one addition and one subtraction. If no step was taken, or something was raised, they come
        back bit for bit.

        Args:
            moves: of `moves`.
            loss: as there.
            update: as in `Method.step`.

        Returns:
            The result of `update`.
        """
        before = [weight.detach().clone() for weight in self._weights]
        taken = False
        try:
            with torch.no_grad():
                torch._foreach_add_(self._weights, moves)
            taken = update(loss())
        finally:
            with torch.no_grad():
                if taken:
                    torch._foreach_sub_(self._weights, moves)
                else:
                    torch._foreach_copy_(self._weights, before)
        return taken
