"""What the tests of the engine's programs share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.engine.cpu_program import Program


def program_gradient(program: Program, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the summed cross-entropy in the images."""
    output, run = program.forward(x)
    logits = output.float().requires_grad_()
    (at_logits,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), logits)
    gradient = program.backward(run, at_logits)
    assert gradient is not None
    return logits.detach(), gradient.float().clone()


def agree(program: Program, model: nn.Module, x: Tensor, error: float = 0.03) -> None:
    """Compare logits and gradients with those of the model in float64.

    Args:
        program: of the model.
        model: with five classes.
        x: images.
        error: largest relative error of the logits, and largest difference of a cosine of gradients from 1.
    """
    y = torch.arange(len(x)) % 5
    leaf = x.double().requires_grad_()
    wide = model.double()
    wanted = wide(leaf)
    (slope,) = torch.autograd.grad(F.cross_entropy(wanted, y, reduction="sum"), leaf)
    model.float()
    logits, gradient = program_gradient(program, x, y)
    assert (logits - wanted).norm() / wanted.norm() < error
    cosine = F.cosine_similarity(gradient.double().flatten(1), slope.flatten(1))
    assert cosine.min() > 1 - error, cosine
    sizes = gradient.flatten(1).norm(dim=1) / slope.flatten(1).norm(dim=1)
    assert (sizes - 1).abs().max() < error / 0.3, sizes
