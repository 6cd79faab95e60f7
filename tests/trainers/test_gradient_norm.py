"""The norm of the gradients, which is compared with the loss on its device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastadv.trainers.optim import gradient_norm


@pytest.mark.parametrize("with_gradient", [True, False])
def test_the_norm_lies_on_the_device_of_the_weights(with_gradient: bool) -> None:
    """Also where no weight has a gradient, as in the strategy network of LAS-AT in most iterations."""
    weight = nn.Parameter(torch.ones(3, device="meta"))
    weight.grad = torch.ones_like(weight) if with_gradient else None
    assert gradient_norm(torch.optim.SGD([weight], 0.1)).device.type == "meta"


def test_without_gradients_the_norm_is_zero() -> None:
    assert gradient_norm(torch.optim.SGD([nn.Parameter(torch.ones(3))], 0.1)) == 0
