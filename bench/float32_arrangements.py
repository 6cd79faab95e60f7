"""The float32 ladder of `throughput.py --precision fp32`: loops for processors without bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from arrangements import (
    ALPHA,
    EPS,
    Run,
    Task,
    attack_loop,
    foolbox_pgd,
    fp32_loop,
    torchattacks_pgd,
)
from torch import nn

import fastadv


def loop(task: Task, channels_last: bool) -> Run:
    """PGD with `autograd.grad` on the frozen model: no weight gradients."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = task.twin().requires_grad_(False).to(memory_format=layout)
    x = task.x.contiguous(memory_format=layout)
    return lambda: attack_loop(model, x, task.y, task.steps)


def compiled_loop(
    task: Task, fold: bool, channels_last: bool = True, mode: str | None = None
) -> Run:
    """The same under `torch.compile`, BatchNorm folded by torch's own tool or not."""
    from torch.fx.experimental.optimization import fuse

    layout = torch.channels_last if channels_last else torch.contiguous_format
    twin: nn.Module = copy.deepcopy(task.model).eval()
    model = (fuse(twin) if fold else twin).requires_grad_(False).to(memory_format=layout)
    compiled = torch.compile(model, mode=mode)
    x = task.x.contiguous(memory_format=layout)
    return lambda: attack_loop(compiled, x, task.y, task.steps)


def fastadv_pgd(task: Task, engine: str) -> Run:
    attack = fastadv.PGD(task.twin(), EPS, ALPHA, task.steps, precision="fp32", engine=engine)
    return lambda: attack(task.x, task.y)


FLOAT32_ATTACKS: dict[str, Callable[[Task], Run]] = {
    "foolbox LinfPGD": foolbox_pgd,
    "torchattacks PGD": torchattacks_pgd,
    "B0 fp32, loss.backward()": fp32_loop,
    "F1 frozen, autograd.grad": partial(loop, channels_last=False),
    "F2 F1 channels-last": partial(loop, channels_last=True),
    "F3 torch.compile of F1": partial(compiled_loop, fold=False, channels_last=False),
    "F4 torch.compile of F2": partial(compiled_loop, fold=False),
    "F5 torch.compile of F2, folded": partial(compiled_loop, fold=True),
    "F6 torch.compile of F5, max-autotune": partial(compiled_loop, fold=True, mode="max-autotune"),
    "fastadv, live model": partial(fastadv_pgd, engine="eager"),
    "fastadv": partial(fastadv_pgd, engine="compiled"),
}
FLOAT32_COMPILED = tuple(name for name in FLOAT32_ATTACKS if "torch.compile" in name)
