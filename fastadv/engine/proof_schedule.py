"""Attacks on the live model with few proofs, where the live model runs as in a plain loop.

The live model in float32 has its own code, weights, hooks and precision, so that no proof is needed for these. A
proof before an attack tells three things more: that the model draws no random numbers, that its code bears
channels-last images, and that it still is the network for which engines were timed. So some attacks between two
proofs begin without one. The first pass of such an attack must call the functions of torch that it called after
the last proof, with the same numbers, and no generator may move. In every other case the proof follows. The result
stands if the proof finds the same engine. Else generators are put back, and the attack runs anew.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from fastadv.engine.adaptation import Questions
from fastadv.engine.compiled_parts import has_compiled_parts
from fastadv.engine.engines import Engine
from fastadv.engine.live_engines import LiveEngine
from fastadv.engine.randomness import shared_states

_Result = TypeVar("_Result")
_LONGER = 3  # times as many attacks as so far, before the next proof
_MOST_CHANGES = 2  # proofs that came too late, after which there is a proof before every attack
_KEPT = 16  # number of batch sizes and kinds of images
_PLAIN = frozenset((int, float, bool, str, type(None)))


class CallList(Questions):
    """Lists the functions of torch that the calling thread calls, with the numbers among their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one function; reading a property is no call."""
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling():
            if getattr(func, "__name__", "") == "__get__":
                self.look_at(func, args, sys._getframe(1))
            else:
                plain = [value for value in args if value.__class__ in _PLAIN]
                named = [pair for pair in kwargs.items() if pair[1].__class__ in _PLAIN]
                self.calls.append((func, plain, named))
        return func(*args, **kwargs)


class _Generators:
    """The states of the generators that all code shares."""

    def __init__(self) -> None:
        self._torch, self._others = torch.get_rng_state(), shared_states()
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def have_moved(self) -> bool:
        return (
            not torch.equal(torch.get_rng_state(), self._torch) or shared_states() != self._others
        )

    def put_back(self) -> None:
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        np.random.set_state(self._numpy)


@dataclass
class _Standing:
    """What is known of the attacks on batches of one size.

    Attributes:
        engine: of the last proof; None where every attack needs one.
        calls: those of the first pass after it.
        uses: number of attacks.
        next_proof: the number of attacks before the next proof.
        changes: proofs that came after an attack and found another engine.
    """

    engine: LiveEngine | None = None
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    uses: int = 0
    next_proof: int = 0
    changes: int = 0


class ProofSchedule:
    """Which live models of one cache may be attacked without a proof."""

    def __init__(self) -> None:
        self._standings: dict[Hashable, _Standing] = {}

    def trial(self, model: object, key: Hashable) -> Trial[Any]:
        """One attack; ``key`` is the same for equal kinds of images and batch sizes."""
        standing = self._standings.setdefault(key, _Standing())
        while len(self._standings) > _KEPT:
            del self._standings[next(iter(self._standings))]
        return Trial(model, standing)


class Trial(Generic[_Result]):
    """One attack. First `unproven` is called, then, if there is no result, `proven`.

    Args:
        model: the model.
        standing: of its kind of images; changed.
    """

    def __init__(self, model: object, standing: _Standing) -> None:
        self._model, self._standing = model, standing
        self._found: tuple[_Result] | None = None
        self._before: _Generators | None = None
        self._calls: list[tuple[Any, ...]] = []

    def unproven(self, run: Callable[[Engine], _Result]) -> _Result | None:
        """The result by the engine of the last proof; None where the engine is to be proven."""
        standing, engine = self._standing, self._standing.engine
        standing.uses += 1
        if engine is None or standing.uses > standing.next_proof:
            return None
        self._before = _Generators()
        try:
            self._found = (self._watched(engine, run),)
        except Exception:  # it comes again, unless the code no longer bears channels-last images
            return None
        is_sure = self._calls == standing.calls and not self._before.have_moved()
        return self._found[0] if is_sure else None

    def proven(self, engine: Engine, run: Callable[[Engine], _Result]) -> _Result:
        """The result by an engine that has just been proven."""
        standing, before = self._standing, self._before
        if before is not None and engine is not standing.engine:
            before.put_back()
            standing.changes += 1
        elif self._found is not None:
            self._note(engine)
            return self._found[0]
        standing.engine = None
        if not isinstance(engine, LiveEngine) or not engine.may_skip_proofs:
            return run(engine)
        result = self._watched(engine, run)
        self._note(engine)
        return result

    def _watched(self, engine: LiveEngine, run: Callable[[Engine], _Result]) -> _Result:
        """The result, with the calls of the first pass."""
        engine.first_pass = watch = CallList()
        try:
            return run(engine)
        finally:
            engine.first_pass, self._calls = None, watch.calls

    def _note(self, engine: Engine) -> None:
        """Note that an engine was proven, and what its first pass has called."""
        standing = self._standing
        hides_calls = isinstance(self._model, nn.Module) and has_compiled_parts(self._model)
        if standing.changes < _MOST_CHANGES and not hides_calls:
            assert isinstance(engine, LiveEngine)
            standing.engine, standing.calls = engine, self._calls
            standing.next_proof = _LONGER * standing.uses
