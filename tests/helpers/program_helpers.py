"""What the tests of the engine's programs share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.engine.cpu_program import Program


def program_gradient(program: Program, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the summed cross-entropy in the images."""
    output, run = program.forward(x)
    logits = output.float().requires_grad_()
    (at_logits,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), logits)
    gradient = program.backward(run, at_logits)
    assert gradient is not None
    return logits.detach(), gradient.float().clone()
