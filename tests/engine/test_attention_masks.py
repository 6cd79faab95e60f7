"""Attention of tokens that attend to nothing: the fused steps give what torch gives, no equal weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attack_helpers import images, randomise
from foreign_models import conv
from test_attack_copy import cosine
from torch import Tensor, nn

import fastadv
from fastadv.engine import cpu_channels
from fastadv.engine.copy_engines import ProgramEngine

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not cpu_channels.available(), reason="a processor with AVX512-BF16"),
]


class Attention(nn.Module):
    """Attention under a mask that the model keeps, or makes from one that it keeps."""

    def __init__(self, mask: Tensor, made: bool) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 24), nn.Linear(8, 4)
        self.register_buffer("mask", mask)
        self.made = made

    def forward(self, x: Tensor) -> Tensor:
        tokens = F.adaptive_avg_pool2d(self.stem(x), 4).flatten(2).transpose(1, 2)
        q, k, v = tokens.reshape(len(x), 16, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mask = self.mask.masked_fill(self.mask < -1, -torch.inf) if self.made else self.mask
        out = F.scaled_dot_product_attention(3 * q, k, v, attn_mask=mask)
        return self.head(out.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("masked", ["no row", "some places", "whole rows"])
def test_rows_that_are_masked_everywhere(masked: str, made: bool) -> None:
    torch.manual_seed(0)
    mask = torch.zeros(16, 16)
    if masked == "some places":
        mask[:, ::3] = -torch.inf
    elif masked == "whole rows":
        mask[:11] = -torch.inf
    model, x = Attention(mask, made), images(8)
    kept = model.mask.clone()
    randomise(model)
    model.mask.copy_(kept)
    attack = fastadv.PGD(model.eval(), steps=1, engine="fixed", precision="bf16")
    engine = attack.engine_for(x)
    assert isinstance(engine, ProgramEngine) and engine.precision == "bf16"
    for _ in range(2):
        found = engine.gradient(engine.images(x), lambda z: z[:, 0] - z[:, 1])
        leaf = x.clone().requires_grad_()
        logits = model(leaf)
        (wanted,) = torch.autograd.grad((logits[:, 0] - logits[:, 1]).sum(), leaf)
        distance = (found.logits - logits.detach()).norm() / logits.detach().norm()
        assert float(distance) < 0.03
        assert cosine(found.grad, wanted) > 0.97
