"""Short attacks under torchattacks' names."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from fastadv import compat

EPS = 0.1


def short(kind: Any, model: nn.Module, **more: Any) -> compat.Attack:
    """An attack of few steps, in float32."""
    known = inspect.signature(kind).parameters
    steps, eps = (60 if kind is compat.CW else 4), (1.0 if kind is compat.PGDL2 else EPS)
    options = {"eps": eps, "steps": steps, "n_queries": 30, "lr": 0.05, **more}
    attack: compat.Attack = kind(model, **{k: v for k, v in options.items() if k in known})
    attack.own.precision = "fp32"
    return attack
