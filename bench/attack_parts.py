"""Where the time of a PGD attack goes: the work once per attack, and the parts of each step.

`throughput.py` prints this below its tables and keeps it in its JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from arrangements import Task
from measure import Seconds, interleave
from torch import Tensor

import fastadv
from fastadv.engine.choice import name_of
from fastadv.engine.compiled_parts import unwrapped
from fastadv.engine.copy_engines import EngineOnCopy, ProgramEngine
from fastadv.engine.live_engines import LiveEngine
from fastadv.engine.recorder import record
from fastadv.engine.replayed_program import NOT_YET
from fastadv.ops import pgd_step_


def passes_of(engine: Any, task: Task) -> tuple[str, dict[str, Callable[[], object]]]:
    """The passes that an attack makes at each step by an engine, in words, and the parts of one to be timed.

    They have run as often as it takes until they stay the same.
    """
    chosen = isinstance(engine, EngineOnCopy | LiveEngine)
    name, x = name_of(engine) if chosen else f"live model ({engine.name})", engine.images(task.x)
    if not isinstance(engine, ProgramEngine):

        def values(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits, task.y, reduction="none")

        engine.gradient(x, values)
        return name, {"forward and input gradient": lambda: engine.gradient(x, values)}
    passes, started = engine.passes, []
    at_logits = torch.randn_like(engine.logits(x))

    def forward() -> None:
        started[:] = [passes.forward(x, with_gradient=True)[1]]

    def backward() -> None:
        passes.backward(started[0], at_logits)

    while True:
        forward()
        backward()
        why = passes.why_not_replayed(x, with_gradient=True)
        if why != NOT_YET:
            break
    how = "replayed from the calls of an earlier pass" if why is None else f"not replayed: {why}"
    return f"{name}, {how}", {"forward": forward, "input gradient": backward}


def parts_of_attack(task: Task, rounds: int, precision: str) -> tuple[str, dict[str, Seconds]]:
    """Where an attack step's time goes: forward, input gradient, update; and the work once per attack.

    The engine is the one of the arrangement called fastadv. The passes are timed first, since those of other
    weights are recorded anew.

    Returns:
        The engine's passes in words, and the times.
    """
    options: Any = {"precision": "fp32", "engine": "compiled"} if precision == "fp32" else {}
    attack = fastadv.PGD(task.model, **options)
    engine = attack.engine_for(task.x)
    x = engine.images(task.x)
    adv, gradient = x.clone(), torch.randn_like(x)
    model, probe = unwrapped(task.model), task.x[:2]

    def changed_model() -> None:
        with torch.no_grad():
            next(model.parameters()).mul_(1.0001)
        attack.engine_for(task.x)

    with engine.session(model, 0, current=True):
        name, parts = passes_of(engine, task)
        parts["update"] = lambda: pgd_step_(adv, gradient, x, 8 / 255, 2 / 255)
        steps = interleave(parts, rounds, task.device)
    once = {
        "recording the live model (once per attack)": lambda: record(model, probe, careful=False),
        "proof and refresh, after a change of weights (once per attack)": changed_model,
        "proof, the model as before (once per attack)": lambda: attack.engine_for(task.x),
    }
    return name, interleave(once, rounds, task.device) | steps
