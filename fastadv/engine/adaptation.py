"""Models whose forward pass depends on whether their parameters require grad.

Some take gradients in their own parameters, as those do that adapt to images. Others ask for `requires_grad`. If
their parameters did not require grad, another network would be attacked. Models that write into their parameters
without gradients, such as those that normalise their weights, count as adapting, too.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastadv.engine.content import content_or_counters
from fastadv.engine.frozen import kept_parameters, parameters_of
from fastadv.engine.networks import parts_of
from fastadv.engine.operands import leads_to
from fastadv.engine.own_functions import reads_for_itself
from fastadv.engine.randomness import can_be_watched, draws_can_be_watched
from fastadv.engine.recording_mode import uncompiled


class Adaptation:
    """Whether a model adapts in its forward pass, or asks whether its parameters require grad.

    Args:
        never: it does not, and no pass is watched.
        unlikely: it did not when it was last looked at. Its parameters are then kept from the first gradient on
            that it takes, and not from the beginning.
        questions: watches the pass that tells, and has been entered before; None lets it enter one of its own.

    Attributes:
        is_known: whether a pass has told.
        adapts: whether the model does so, for all that is known.
    """

    def __init__(
        self, never: bool = False, unlikely: bool = False, questions: Questions | None = None
    ) -> None:
        self._questions = questions
        self.is_known, self.adapts = never, not (never or unlikely)
        self._unlikely = unlikely
        self._to_freeze: list[nn.Parameter] = []
        self._kept = ExitStack()  # parameters of a model that adapts after all

    @property
    def needs_gradients(self) -> bool:
        """Whether the parameters must require grad in the next pass."""
        return self.adapts or not self.is_known

    @contextmanager
    def found_out(self, model: object, images: Tensor) -> Iterator[None]:
        """Watch one forward pass on images, after which it is known whether the model adapts.

        The parameters of a model that does not adapt require no grad from the next pass on. The backward pass of
        the watched one must find them as its forward pass did: an autograd function may take their gradients.
        """
        self.freeze()
        if self.is_known or not (self._unlikely or torch.is_grad_enabled()):
            yield
            return
        # Lazy ones get their shape in the pass, and bear no hooks before.
        every = parameters_of(parts_of(model))
        every = [p for p in every if not nn.parameter.is_lazy(p)]
        parameters = [p for p in every if p.requires_grad]
        before = None if self._unlikely else content_or_counters(every)
        taken = False

        def note(grad: Tensor) -> None:
            nonlocal taken
            if self._unlikely and not taken:
                # Nothing has been written yet: hooks run before their gradients arrive.
                self._kept.enter_context(kept_parameters(parameters))
            taken = True

        hooks = [parameter.register_hook(note) for parameter in parameters]
        questions = self._questions or Questions()
        try:
            with ExitStack() as stack:
                if isinstance(model, nn.Module):  # the code of a compiled part must run to be seen
                    stack.enter_context(uncompiled(model))
                if parameters and _can_be_asked(model):
                    stack.enter_context(nullcontext() if self._questions else questions)
                    questions.images = images
                yield
        finally:
            questions.images = None
            for hook in hooks:
                hook.remove()
        written = before is not None and before != content_or_counters(every)
        self.is_known, self.adapts = True, taken or written or questions.seen
        self._to_freeze = [] if self.adapts else parameters

    def freeze(self) -> None:
        """Let the parameters of a model that was found not to adapt require no grad."""
        for parameter in self._to_freeze:
            parameter.requires_grad_(False)
        self._to_freeze = []

    def end(self) -> None:
        """Let go of the parameters; those of a model that has adapted against expectation are put back."""
        self.freeze()
        self._kept.close()


def _can_be_asked(model: object) -> bool:
    """Whether `Questions` leaves the results of a model as they are."""
    if isinstance(model, nn.Module):
        return can_be_watched(model)
    return draws_can_be_watched(model)


class Questions(TorchFunctionMode):
    """Watches a forward pass for questions whether tensors that do not depend on the images require grad.

    Attributes:
        images: the images; None where nobody asks for questions.
        seen: whether there was one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.images: Tensor | None = None
        self.seen = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one function."""
        # Not within `torch.cond`: the compiler cannot look at frames.
        if self.images is not None and not torch.compiler.is_compiling():
            self.look_at(func, args, sys._getframe(1))
        return func(*args, **(kwargs or {}))

    def look_at(self, func: Any, args: tuple[Any, ...], caller: types.FrameType) -> None:
        """Look whether a call of a function of torch is such a question, before it runs."""
        if self.images is not None and not self.seen and reads_for_itself(func, caller):
            self.seen = args[0] is not self.images and not leads_to(args[0], self.images)
