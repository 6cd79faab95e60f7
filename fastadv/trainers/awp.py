"""AWP: training at adversarially perturbed weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastadv.ranks import Ranks
from fastadv.trainers.method import LossResult, Update
from fastadv.trainers.optim import BufferGuard


class WeightPerturbation:
    """Adversarial weight perturbation: the gradient step is computed at w + gamma |w| g / |g|.

    Afterwards the perturbation is subtracted. w is a weight tensor with more than one dimension, g is the gradient
    of the training loss on the batch, and the norms are norms of the whole tensor. Biases and BatchNorm's weights
    are not perturbed. Weight decay acts on the perturbed weights.

    Source: Wu et al. 2020, algorithm 1 with one step, as in the authors' code (csdongxian/AWP). That code takes g
    from a copy of the model, which is not needed here.

    Args:
        models: the trained models; the weights of the first are perturbed.
        gamma: size of the perturbation relative to the weights.
        ranks: the processes that train together; all apply the same perturbation.

    Raises:
        ValueError: if the first model has no trained weights with more than one dimension.
    """

    def __init__(self, models: Sequence[nn.Module], gamma: float, ranks: Ranks) -> None:
        self._ranks = ranks
        self.gamma = gamma
        self._weights: list[Tensor] = [
            p for p in models[0].parameters() if p.requires_grad and p.dim() > 1
        ]
        if not self._weights:
            raise ValueError(
                f"awp_gamma must be 0 for {type(models[0]).__name__}: of its trained weights "
                "no parameter has more than one dimension"
            )
        self._guard = BufferGuard(list(models))

    def moves(self, loss: Callable[[], LossResult]) -> list[Tensor]:
        """Return the perturbation of each weight tensor. The weights, their `.grad` and the buffers do not change.

        Args:
            loss: runs the models and returns the training loss.

        Returns:
            gamma |w| g / |g| for each weight tensor; 0 for a tensor whose g is 0 or not finite.
        """
        self._guard.save()
        try:
            found = torch.autograd.grad(
                loss().loss, self._weights, allow_unused=True, materialize_grads=True
            )
        finally:
            self._guard.restore()
        gradients = self._ranks.sum_all(
            found
        )  # the sum in place of the mean: only the direction counts
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
        """Take a step at the perturbed weights, and undo the perturbation.

        After a step the perturbation is subtracted. Weights that the step does not change get their old values, up
        to the rounding of one addition and one subtraction. If no step was taken, or an exception was raised, all
        weights get their old values, bit for bit.

        Args:
            moves: the result of `moves`.
            loss: runs the models and returns the training loss.
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
